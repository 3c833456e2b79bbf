"""Who may import whom, by folder: every import goes down, and no two folders import each other."""

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import run_python

# A room (a folder, or a module of the ground floor) -> the rooms of its package that it may import.
GROUND = {"files", "extras", "progress", "console", "distributed"}
ROOMS = {
    "kl_autoencoder": {
        "files": set(),
        "extras": set(),
        "progress": {"distributed"},
        "distributed": set(),
        "console": {"files", "progress"},
        "networks": set(),
        "data": {"files", "extras"},
        "inference": {"networks"},
        "models": GROUND | {"networks", "inference", "data"},
        "latents": GROUND | {"networks", "inference", "data", "models"},
        "codec": GROUND | {"data", "models"},
        "evaluation": GROUND | {"networks", "data", "models", "codec"},
        "demo": GROUND | {"networks", "data", "models", "latents", "evaluation", "codec"},
        "cli": GROUND | {"networks", "data", "models", "latents", "evaluation", "codec", "demo"},
        "__main__": {"cli"},
    },
    "train": {
        "settings": set(),
        "data": {"settings"},
        "parts": {"settings"},
        "config": {"data", "parts", "settings"},
        "loop": {"config", "data"},
        "autoencoder": {"config", "data", "loop", "one_network", "parts"},
        "codec": {"config", "data", "loop", "parts", "autoencoder", "one_network"},
        "smoke": {"config", "data"},
        "one_network": {"config", "loop"},
        "prior": {"config", "data", "loop", "one_network"},
        "diffusion": {"config", "data", "loop", "one_network", "parts"},
        "tasks": {"config", "loop", "autoencoder", "codec", "diffusion", "prior", "smoke"},
        "__main__": {"config", "data", "loop", "smoke", "tasks"},
    },
}
PACKAGES = list(ROOMS)
MOST_MODULES = 12  # in a folder
MOST_LINES = 60  # of a function


@cache
def modules(package: str) -> dict[str, ast.Module]:
    """Every module of a package by its dotted name, parsed."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {_dotted(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def imports(package: str, module: str) -> frozenset[str]:
    """The full names that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(modules(package)[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*inside, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return frozenset(found)


def room(name: str) -> str:
    """`kl_autoencoder.models.scaling` -> "models"."""
    return name.split(".")[1]


def rooms_imported(package: str, module: str) -> set[str]:
    found = {room(name) for name in imports(package, module) if name.startswith(f"{package}.")}
    return found - {room(module), "__init__"}


@pytest.mark.parametrize(
    ("package", "module"), [(p, m) for p in PACKAGES for m in modules(p) if room(m) != "__init__"]
)
def test_imports_go_down(package, module):
    allowed = ROOMS[package].get(room(module), set())
    names = {name for name in rooms_imported(package, module) if name in ROOMS[package]}
    assert names <= allowed, f"{module} imports {sorted(names - allowed)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_each_folder_is_a_room_and_no_two_import_each_other(package):
    found = {room(name) for name in modules(package)}
    assert found - {"__init__", "__main__"} == set(ROOMS[package]) - {"__main__"}
    graph = {name: set() for name in ROOMS[package]}
    for module in modules(package):
        if room(module) in graph:
            graph[room(module)] |= rooms_imported(package, module) & set(graph)
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_has_few_modules(package):
    for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
        held = [path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")]
        assert len(held) <= MOST_MODULES, f"{folder.relative_to(ROOT)}: {len(held)} modules"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_function_is_read_on_one_screen(package):
    long = {
        f"{name}.{node.name}": lines
        for name, module in modules(package).items()
        for node in ast.walk(module)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := node.end_lineno - node.lineno + 1) > MOST_LINES
    }
    assert not long


def test_the_library_never_imports_the_training_program_or_the_tests():
    for module in modules("kl_autoencoder"):
        roots = {name.split(".")[0] for name in imports("kl_autoencoder", module)}
        assert not roots & {"train", "tests"}, module
        assert "accelerate" not in roots or module == "kl_autoencoder.distributed", module


def test_networks_know_torch_alone():
    for module in modules("kl_autoencoder"):
        if room(module) == "networks":
            roots = {name.split(".")[0] for name in imports("kl_autoencoder", module)}
            assert roots - set(sys.stdlib_module_names) <= {"torch", "kl_autoencoder"}, module


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'diffusers', 'PIL', 'lpips', 'datasets', 'transformers', 'safetensors'}"
    for name in ("kl_autoencoder", "kl_autoencoder.cli"):
        program = f"import sys, {name}; print(sorted({heavy} & set(sys.modules)))"
        result = run_python(program)
        assert result.stdout.strip() == "[]", f"{name}: {result.stdout}{result.stderr}"


def test_type_checkers_see_the_public_names():
    """They cannot follow the lazy imports: the names are imported under TYPE_CHECKING, from the same modules."""
    import kl_autoencoder

    seen = imports("kl_autoencoder", "kl_autoencoder.__init__") - {"importlib.import_module"}
    public = {f"kl_autoencoder.{module}.{name}" for name, module in kl_autoencoder._HOME.items()}
    assert {name for name in seen if not name.startswith("typing.")} == public


# A room's page names its own modules as `name.py`, and files elsewhere by their path.
FOLDERS = sorted({path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")})
IN_CODE = re.compile(r"`([^`\s]+)`")


def folder_name(folder: Path) -> str:
    return str(folder.relative_to(ROOT))


@pytest.mark.parametrize("folder", FOLDERS, ids=folder_name)
def test_a_room_has_a_page_that_names_its_modules_and_no_others(folder):
    page = (folder / "README.md").read_text(encoding="utf-8")
    named = {word for word in IN_CODE.findall(page) if word.endswith(".py") and "/" not in word}
    held = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert named - {"__init__.py", "__main__.py"} == held, (
        "its README.md names each as `name.py`, and no others"
    )
    inside = {f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").is_file()}
    assert inside <= set(IN_CODE.findall(page))


@pytest.mark.parametrize("folder", FOLDERS, ids=folder_name)
def test_a_page_says_what_its_room_may_import(folder):
    package, *rooms = folder.relative_to(ROOT).parts
    line = re.search(r"^May import: (.*)$", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    if len(rooms) == 1:
        assert set(IN_CODE.findall(line[1])) == ROOMS[package][rooms[0]]
    else:
        assert line is None


PAGES = sorted(
    {
        *(folder / "README.md" for folder in FOLDERS),
        *(ROOT / ".github").glob("*.md"),
        *(ROOT / name / "README.md" for name in (".", "configs", "tests/benchmarks")),
    }
)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
TREE = ("kl_autoencoder", "train", "configs", "tests", ".github", ".ci")


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=folder_name)
def test_links_and_paths_on_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link
    roots = [ROOT, *(parent for parent in page.parents if parent.is_relative_to(ROOT))]
    for word in IN_CODE.findall(text):
        path = re.fullmatch(r"[\w.][\w./-]*/[\w./-]*", word)
        if path and (page != ROOT / "README.md" or word.split("/")[0] in TREE):
            assert any((root / word).exists() for root in roots), word
