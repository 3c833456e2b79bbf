"""The script of a GPU day, rehearsed on a CPU: it continues after a part was cut off, and names what failed."""

import json
from types import SimpleNamespace

import pytest

from kl_autoencoder import KLAutoencoder
from tests.benchmarks import gpu_day
from tests.benchmarks.gpu_day import Part, check_execution, check_gradients, check_group_norm, day, run, ways


def options(folder, **more):
    return SimpleNamespace(output=folder, rehearse=True, minutes=5, data="sample-photographs", **more)


@pytest.mark.parametrize(
    "checks", [lambda: check_group_norm("cpu"), lambda: check_execution("cpu", True),
               lambda: check_gradients("cpu", True)], ids=["group norm", "execution", "gradients"],
)  # fmt: skip
def test_the_checks_pass_on_right_kernels(checks):
    found = list(checks())
    assert len(found) >= 4 and all(error <= limit for _, error, limit in found), found


def test_every_way_can_be_called():
    """Without a rehearsal's shortcut: the compiled one is a model that is compiled when it is called."""
    vae = KLAutoencoder(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    for direction in ("encode", "decode"):
        found = dict(ways(vae, direction, rehearse=False))
        assert list(found) == ["as called", "in pieces", "tiled", "offloaded", "compiled"]
        assert found["compiled"].args[0].decoder._compiled_call_impl is not None


def test_the_checks_fail_on_a_wrong_kernel(monkeypatch):
    monkeypatch.setattr("kl_autoencoder.inference.group_norm.F.silu", lambda y, inplace: y.sigmoid_())
    assert not any(error <= limit for _, error, limit in check_group_norm("cpu"))


def command(program):
    return [gpu_day.sys.executable, "-c", program]


def test_parts_that_ended_are_not_run_again_and_the_ends_are_told_apart(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    count = "import pathlib, uuid; pathlib.Path(r'{}', str(uuid.uuid4())).touch()".format(tmp_path / "runs")
    found = [
        Part("first", command(count), 30),
        Part("endless", command("import time; print('begun', flush=True); time.sleep(99)"), 1),
        Part("broken", command("raise SystemExit('no such kernel')"), 30),
        Part("training", command("import time; time.sleep(99)"), 1, stopped=True),
    ]
    monkeypatch.setattr(gpu_day, "parts", lambda options: found)
    for _ in range(2):
        assert not day(options(tmp_path / "out"))
    ends = {
        name: part["end"]
        for name, part in json.loads((tmp_path / "out" / "gpu-day.json").read_text())["parts"].items()
    }
    assert ends == {"first": "ended", "endless": "cut", "broken": "failed (1)", "training": "stopped"}
    assert len(list((tmp_path / "runs").iterdir())) == 1 and "ended before" in capsys.readouterr().out
    page = (tmp_path / "out" / "gpu-day.md").read_text()
    assert "    no such kernel" in page and "    begun" in page


def test_each_part_names_scripts_and_recipes_that_are_there():
    for rehearse in (True, False):
        found = gpu_day.parts(SimpleNamespace(output=gpu_day.ROOT / "x", rehearse=rehearse, data="d"))
        for part in found:
            named = [word for word in part.command if word.endswith((".py", ".yaml"))]
            assert named and all((gpu_day.ROOT / word).is_file() for word in named), part
    assert sum(part.seconds for part in found if not part.stopped) < 40 * 60


def test_nothing_begins_when_the_time_is_over(tmp_path):
    assert run(Part("late", command("print(1)"), 30), tmp_path, deadline=0.0) == "not begun"
    assert not list(tmp_path.iterdir())
