"""Who may import whom, held by walking the imports of every module; see each table for what is allowed."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

# Inside the library. What is not named here is a part of inference or a newcomer: it may import what lies below the
# model and the other parts.
BELOW = {"files", "network", "posterior", "sources", "images", "latents", "checkpoints"}
LIBRARY = {
    "__init__": set(),
    "files": set(),
    "network": set(),
    "posterior": set(),
    "metrics": set(),
    "sources": set(),
    "images": {"files"},
    "latents": {"files"},
    "checkpoints": {"files"},
    "ranks": set(),
    "baselines": {"images"},
    "photographs": {"images", "sources"},
    "frechet": {"files", "metrics"},
    "latent_analysis": {"posterior"},
    "latent_studies": {"autoencoder", "metrics"},
    "candidates": {"autoencoder", "baselines", "images", "posterior"},
    "evaluation": {
        *("candidates", "frechet", "images", "latent_analysis", "latent_studies", "metrics"),
        *("photographs", "ranks"),
    },
    "plots": set(),
    "report": {"evaluation", "images", "plots"},
    "autoencoder": {"network", "posterior", "checkpoints", "latents", "inference"},
    "half": {"autoencoder", "network"},
    "half_check": {"autoencoder", "half", "images"},
    "finding": {"autoencoder", "images"},
    "cli": {"launching"},
    "crops": {"images"},
    "launching": set(),
    "shards": {"files"},
    "encoding": {
        *("autoencoder", "crops", "latent_rows", "latents", "launching", "shards", "sources", "workers"),
    },
    "latent_rows": {"autoencoder", "crops", "latents", "posterior", "workers"},
    "latent_space": {"latents", "posterior"},
    "anomaly": {"autoencoder"},
    "latent_dataset": {"latents", "posterior", "shards"},
}
# These sit on top: nobody imports them but one another.
TOP = {"cli", "commands", "dataset_commands", "evaluate", "latent_commands"}

# Inside the training program. What is not named here is a leaf: it may read config, and nothing else of train.
TRAIN = {
    "__init__": set(),
    "__main__": {"config", "smoke", "trainer"},
    "bad_steps": {"journal"},
    "config": {"data"},
    "data": {"samples", "streams"},
    "engine": {"checkpoint", "config", "discriminator", "losses", "model", "schedules"},
    "samples": set(),
    "smoke": {"config", "data"},
    "streams": {"samples"},
    "start": set(),
    "model": {"config", "start"},
}
LEAVES_READ = {"config"}


@cache
def imports(package: str) -> dict[str, list[tuple[str, bool]]]:
    """Of each module of a package: what it imports, by full name, and whether that happens as it is imported."""
    return {path.stem: list(_imports(path, package)) for path in sorted((ROOT / package).glob("*.py"))}


def _imports(path, package):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{path}: {ast.unparse(node)}"
            origin = ".".join(filter(None, [package if node.level else None, node.module]))
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in inside) for name in names)


def siblings(package: str, module: str, at_once: bool = False) -> set[str]:
    """The modules of its own package that a module imports; only those it needs to be imported, if `at_once`."""
    modules = set(imports(package))
    found = set()
    for name, first in imports(package)[module]:
        if name.split(".")[0] == package and (first or not at_once):
            part = name.split(".")[1]
            found.add(part if part in modules else "__init__")
    return found


def others(package: str, module: str) -> set[str]:
    """Everything from outside the package and Python's own library, by full name."""
    return {
        name
        for name, _ in imports(package)[module]
        if name.split(".")[0] not in sys.stdlib_module_names and name.split(".")[0] != package
    }


@pytest.mark.parametrize("module", imports("kl_autoencoder"))
def test_the_library(module):
    found = siblings("kl_autoencoder", module)
    parts = set(imports("kl_autoencoder")) - set(LIBRARY) - TOP
    if module not in TOP - {"cli"}:
        extra = found - LIBRARY.get(module, BELOW | parts)
        assert not extra, f"kl_autoencoder/{module}.py imports {extra}"
    assert not found & TOP or module in TOP


@pytest.mark.parametrize("module", imports("train"))
def test_the_training_program(module):
    found = siblings("train", module)
    if module == "trainer":
        assert "__main__" not in found
    else:
        extra = found - TRAIN.get(module, LEAVES_READ)
        assert not extra, f"train/{module}.py imports {extra}"
    mine = {name.split(".")[1] for name in others("train", module) if name.startswith("kl_autoencoder.")}
    assert not mine & {*TOP, "finding"}


@pytest.mark.parametrize("package", ["kl_autoencoder", "train"])
def test_no_circles(package):
    graph = {module: siblings(package, module, at_once=True) - {module} for module in imports(package)}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_the_library_never_imports_the_training_program_or_the_tests():
    for module in imports("kl_autoencoder"):
        roots = {name.split(".")[0] for name in others("kl_autoencoder", module)}
        assert not roots & {"train", "tests"}, module
        assert "accelerate" not in roots or module == "ranks", module


def test_network_and_posterior_know_torch_alone():
    for module in ("network", "posterior"):
        assert {name.split(".")[0] for name in others("kl_autoencoder", module)} == {"torch"}


def test_one_module_touches_the_classes_of_diffusers():
    for package in ("kl_autoencoder", "train"):
        for module in imports(package):
            names = {name for name in others(package, module) if name.split(".")[0] == "diffusers"}
            if (package, module) == ("kl_autoencoder", "autoencoder"):
                assert "diffusers.AutoencoderKL" in names
            else:  # its log is no class
                assert names <= {"diffusers.utils.logging"}, f"{package}/{module}.py: {names}"


def test_the_tables_name_modules_that_exist():
    """So that a table does not go on allowing what is gone."""
    for package, table in (("kl_autoencoder", LIBRARY), ("train", TRAIN)):
        named = set(table).union(*table.values())
        assert named <= set(imports(package))


def test_what_is_light_stays_light():
    heavy = "{'torch', 'numpy', 'diffusers', 'PIL', 'lpips', 'datasets', 'transformers', 'safetensors'}"
    for name in ("kl_autoencoder", "kl_autoencoder.cli"):
        program = f"import sys, {name}; print(sorted({heavy} & set(sys.modules)))"
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert result.stdout.strip() == "[]", f"{name}: {result.stdout}{result.stderr}"
