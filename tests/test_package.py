"""The wheel: its content, and commands run from it elsewhere; the package without its extras."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from PIL import Image
from skimage import data

from kl_autoencoder.extras import EXTRAS
from kl_autoencoder.models.packaged import PACKAGED
from tests.conftest import ROOT


def test_extras_are_those_of_the_metadata():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        names = [entry.partition(">=")[0] for entry in project["optional-dependencies"][extra]]
        assert sorted(names) == sorted(packages.values())
    always = {entry.partition(">=")[0] for entry in project["dependencies"]}
    assert not always & {package for packages in EXTRAS.values() for package in packages.values()}


def run(program, folder, path=ROOT):
    environment = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_commands_without_the_extras_work_or_name_the_extra(tmp_path):
    """Commands that need no extra work; the others name in one line the extra that brings what they need."""
    (tmp_path / "in").mkdir()
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(data, name)()[:64, :64]).save(tmp_path / "in" / f"{name}.png")
    # transformers stays: diffusers imports it wherever it is installed, hidden or not
    modules = sorted({module for modules in EXTRAS.values() for module in modules} - {"transformers"})
    done = run(
        f"""
import sys
sys.modules |= dict.fromkeys({modules!r})  # an import of any of these raises ModuleNotFoundError
from kl_autoencoder.cli import main
from train.__main__ import main as train
for command in (
    "encode in -o z.safetensors", "decode z.safetensors -o back", "reconstruct in -o out --compare",
    "info compact", "export compact -o vae", "fp16-check compact --images in --size 64",
    "sample compact --size 64 --grid 1 -o a.png",
    "interpolate in/chelsea.png in/coffee.png --steps 2 -o b.png",
    "encode-dataset --model vae --data in --size 64 --workers 0 -o latents", "set-scaling vae --from latents",
    "anomaly compact --reference in --data in --size 64 -o scores.csv",
):
    assert main(command.split()) in (0, 1), command
print("REFUSED", file=sys.stderr)
assert main("compress in -o small".split()) == 2
assert main("evaluate --model compact --data in --size 64 -o report".split()) == 2
assert main("fp16-check compact".split()) == 2
assert main("export compact --onnx -o onnx".split()) == 2
assert main("sample compact --fit channel --data sample-photographs --size 64 -o c.png".split()) == 2
assert train(["any.yaml"]) == 2
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    told = done.stderr.partition("REFUSED\n")[2].splitlines()
    assert len(told) == 6
    assert "constriction is not installed; pip install 'kl-autoencoder[codec]' brings" in told.pop(0)
    assert (
        "lpips, matplotlib, pytorch-msssim, scikit-image, scikit-learn, torch-fidelity are not installed"
        in told[0]
    )
    assert "pip install 'kl-autoencoder[eval]'" in told[0] and "'kl-autoencoder[eval]'" in told[1]
    assert "onnx, onnxscript are not installed; pip install 'kl-autoencoder[onnx]'" in told[2]
    assert "scikit-image is not installed; pip install 'kl-autoencoder[train]'" in told[3]
    assert (
        "scikit-image, scikit-learn, tensorboard are not installed; pip install 'kl-autoencoder[train]'"
        in told[4]
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("source")
    for name in ("kl_autoencoder", "train", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "import setuptools.build_meta as backend; backend.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_both_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = [path for package in ("kl_autoencoder", "train") for path in (ROOT / package).rglob("*")]
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in sources
        if path.is_file() and "__pycache__" not in path.parts and not _is_page_of_a_folder(path)
    }
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    recipes = {name for name in held if ".data/data/" in name}
    assert held - recipes == wanted
    assert {name.partition("/configs/")[2] for name in recipes} == configs


def _is_page_of_a_folder(path):
    return path.name == "README.md" and path.parent not in PACKAGED.values()


def test_the_wheel_works_elsewhere(wheel, tmp_path):
    """Installed in a folder of its own, run in another."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, tmp_path / "site", wheel], check=True, capture_output=True)
    (tmp_path / "work" / "train").mkdir(parents=True)  # as a folder of photographs may be called
    Image.fromarray(data.chelsea()[:50, :70]).save(tmp_path / "work" / "cat.png")
    done = run(
        f"""
import sys, sysconfig
import kl_autoencoder, train
assert kl_autoencoder.__file__.startswith({str(tmp_path)!r}) and train.__file__.startswith({str(tmp_path)!r})
sysconfig.get_path = lambda name: {str(tmp_path / "site")!r}  # pip puts data there for a folder of its own
import runpy
for launched in ("train", "kl_autoencoder train"):  # as `accelerate launch -m` starts them
    sys.argv = [*launched.split(), "configs/quickstart.yaml", "--print"]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as done:
        assert done.code == 0, launched
from kl_autoencoder.cli import main
from train.__main__ import main as train
assert main("reconstruct cat.png -o out.png".split()) == 0
assert train(["configs/quickstart.yaml", "--print"]) == 0
""",
        tmp_path / "work",
        tmp_path / "site",
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "work" / "out.png").size == (70, 50)
    assert done.stdout.count("train: sample-photographs") == 3
