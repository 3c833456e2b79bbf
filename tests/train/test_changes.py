"""A run that continues prints what has changed in its configuration, and refuses other data."""

import math
import shutil

import pytest
import yaml

from tests.train.runs import equal, make, small_config, weights
from train.config import to_yaml
from train.loop.checkpoints.changes import compare


@pytest.fixture
def run(photographs, tmp_path):
    """Take a run of two steps; the fixture is the function that configures it again, with other sections."""

    def again(**sections):
        sections = {"train": {"steps": 2}, "optimizer": {"schedule": "cosine", "warmup_steps": 0}} | sections
        return small_config(photographs, tmp_path / "run", **sections)

    make(again()).fit()
    return again


def test_the_same_command_prints_no_change(run, tmp_path, capsys):
    capsys.readouterr()
    make(run())
    said = capsys.readouterr().out
    assert "continuing from" in said and "changed" not in said
    assert compare(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()), run()) == {}


def test_changes_are_printed_by_key(run, tmp_path, capsys):
    """The learning rate too: at step 2 a cosine over 2 steps has fallen to 0, one over 8 steps to 85 %."""
    capsys.readouterr()
    changed = make(run(train={"steps": 8}, loss={"kl": {"weight": 0.5}}, data={"batch_size": 2}))
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("changed since it was started last:")
    rate = 2e-3 * 0.5 * (1 + math.cos(math.pi * 2 / 8))
    assert lines[start + 1 : start + 5] == [
        "  data.batch_size: 4 -> 2",
        "  train.steps: 2 -> 8",
        "  loss.kl.weight: 1e-06 -> 0.5",
        f"  the learning rate jumps from 0 to {rate:.3g} at step 2 (the run had ended at step 2)",
    ]
    assert changed.run.learning_rate(2) == pytest.approx(rate)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["steps"] == 8


def copied(photographs, folder, images):
    folder.mkdir()
    for path in sorted(photographs.iterdir())[:images]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("sections, key", [
    ({"seed": 4}, "seed: 4, but .*run was trained with 3"),
    ({"model": {"layers_per_block": 2}}, "model.layers_per_block: 2, but .* was trained with null"),
    ({"data": {"train": "OTHER"}}, "data.train: .*other, but .*run was trained with "),
    ({"data": {"validation_images": 5}}, "data.validation_images: 5"),  # one image more would be held out
])  # fmt: skip
def test_another_run_is_refused_and_nothing_touched(run, photographs, tmp_path, sections, key):
    other = str(copied(photographs, tmp_path / "other", 47))
    config = run(train={"steps": 4}, **{k: {**v, "train": other} if v == {"train": "OTHER"} else v
                                        for k, v in sections.items() if k != "seed"})  # fmt: skip
    if "seed" in sections:
        object.__setattr__(config, "seed", sections["seed"])
    written, before = (tmp_path / "run" / "config.yaml").read_text(), weights(tmp_path / "run", 2)
    with pytest.raises(ValueError, match=key) as error:
        make(config)
    assert "resume.force=true" in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "run" / "config.yaml").read_text() == written
    assert equal(weights(tmp_path / "run", 2), before)
    if "model" not in sections:
        object.__setattr__(config, "resume", type(config.resume)(force=True))
        assert make(config).step == 2
        assert "force: true" in to_yaml(config)


def test_a_separate_validation_source_may_have_more_images(run, photographs):
    separate = {"validation": str(photographs)}
    make(run(data=separate, resume={"force": True})).fit()
    assert make(run(data=separate | {"validation_images": 5})).step == 2


def test_a_folder_that_was_moved_is_the_same_data(run, photographs, tmp_path, capsys):
    moved = copied(photographs, tmp_path / "moved", 48)
    capsys.readouterr()
    assert make(run(data={"train": str(moved)})).step == 2
    [line] = [line for line in capsys.readouterr().out.splitlines() if "data.train: " in line]
    assert line.endswith(str(moved)[-40:]) and " -> " in line


def test_a_folder_with_other_images_is_other_data(photographs, tmp_path):
    folder = copied(photographs, tmp_path / "growing", 40)
    make(small_config(folder, tmp_path / "run", train={"steps": 1})).fit()
    shutil.copy(sorted(photographs.iterdir())[-1], folder)
    again = {"train": {"steps": 2}}
    with pytest.raises(
        ValueError, match="data.train: 41 images, names .*, but .* was trained with 40 images"
    ):
        make(small_config(folder, tmp_path / "run", **again))
    assert make(small_config(folder, tmp_path / "run", **again, resume={"force": True})).step == 1
