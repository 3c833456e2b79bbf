"""Trackers beside TensorBoard: MLflow in a folder, one that a plugin registers, and one that fails."""

import sys

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from tests.train.runs import make, records
from train.config import Config, LogConfig, build

PLUGIN = """
from accelerate.tracking import GeneralTracker, register_tracker_class

class Notebook(GeneralTracker):
    name, requires_logging_directory, made = "notebook", False, []
    def __init__(self, project, **_):
        super().__init__()
        self.project, self.lines, self.pictures, self.finished = project, [], [], False
        self.made.append(self)
    @property
    def tracker(self):
        return self
    def store_init_configuration(self, values):
        self.config = values
    def log(self, values, step=None, **_):
        self.lines.append((step, values))
        if step == 3:
            raise ConnectionError("the notebook is closed")
    def log_images(self, values, step=None, **_):
        self.pictures.append((step, values))
    def finish(self):
        self.finished = True

register_tracker_class(Notebook)
"""


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A tracker of a user's own module."""
    (tmp_path / "notebook_tracker.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    LOGGER_TYPE_TO_CLASS.pop("notebook", None)
    sys.modules.pop("notebook_tracker", None)


def test_a_tracker_of_a_plugin_gets_scalars_pictures_and_the_configuration(small, notebook, tmp_path, capsys):
    __import__("notebook_tracker")
    trainer = make(small(tmp_path / "run", log={"tensorboard": True, "trackers": ["notebook"]}))
    trainer.fit()
    [tracker] = sys.modules["notebook_tracker"].Notebook.made
    losses = {step: values["train/loss"] for step, values in tracker.lines if "train/loss" in values}
    assert losses == records(tmp_path / "run", "train/loss") and set(losses) == set(range(1, 7))
    assert tracker.config["optimizer.learning_rate"] == 2e-3 and tracker.project == "kl-autoencoder"
    assert [step for step, _ in tracker.pictures] == [0, 6]
    (picture,) = tracker.pictures[-1][1]["validation/pictures"]
    assert np.array_equal(picture, np.asarray(Image.open(tmp_path / "run" / "samples" / "step-000006.png")))
    assert tracker.finished and list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))
    said = capsys.readouterr().out
    assert said.count("WARNING: notebook: cannot be written (ConnectionError: the notebook is closed)") == 1


def test_mlflow_in_a_folder(small, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    try:
        make(small(tmp_path / "run", log={"trackers": ["mlflow"]})).fit()
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("kl-autoencoder")
        [run] = client.search_runs([experiment.experiment_id])
        measured = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")}
        assert measured == records(tmp_path / "run", "train/loss") and len(measured) == 6
        assert run.data.params["data.resolution"] == "32" and run.info.status == "FINISHED"
        pictures = client.list_artifacts(run.info.run_id, "validation/pictures")
        assert [picture.path.rpartition("/")[2] for picture in pictures] == [
            "step-000000.png",
            "step-000006.png",
        ]
    finally:
        mlflow.set_tracking_uri(before)
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize("tensorboard, trackers, wanted", [
    (True, (), ("tensorboard",)),
    (False, (), ()),
    (True, ("mlflow", "tensorboard"), ("tensorboard", "mlflow")),
    (False, ("tensorboard",), ("tensorboard",)),
    (False, ("mlflow", "mlflow"), ("mlflow",)),
])  # fmt: skip
def test_how_the_two_keys_meet(tensorboard, trackers, wanted):
    assert LogConfig(tensorboard=tensorboard, trackers=trackers).all_trackers == wanted


@pytest.mark.parametrize("name, told", [
    ("wandbb", r"log\.trackers: 'wandbb'; allowed: aim, .*wandb, and what a plugin registers"),
    ("comet_ml", r"log\.trackers: 'comet_ml' is not installed; pip install comet-ml"),
])  # fmt: skip
def test_a_tracker_that_is_not_there(small, name, told, tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.trackers.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=told):
        make(small(tmp_path / "run", log={"trackers": [name]}))
    assert not (tmp_path / "run").exists()


def test_plugins_are_imported_before_trackers_are_looked_for(photographs, notebook, tmp_path):
    values = {"output_dir": str(tmp_path / "run"), "plugins": ["notebook_tracker"],
              "data": {"train": str(photographs)}, "log": {"trackers": ["notebook"]}}  # fmt: skip
    assert build(Config, values).log.all_trackers == ("tensorboard", "notebook")
    assert "notebook" in LOGGER_TYPE_TO_CLASS
