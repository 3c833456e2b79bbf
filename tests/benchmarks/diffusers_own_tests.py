"""Run diffusers' own tests of one of its classes, once with that class and once with ours in its place.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python tests/benchmarks/diffusers_own_tests.py diffusers
    python tests/benchmarks/diffusers_own_tests.py diffusers --file tests/models/test_other.py \
        --class AutoencoderKLFlux2 --replacement kl_autoencoder.KLAutoencoder -o /tmp/flux2.json

The tests are those of the checkout; what they test is the installed diffusers. They need `parameterized`. With
HF_HUB_OFFLINE=1 those that read the hub fail for both. In the module of the file and in its classes, every name
that is bound to diffusers' class is bound to the replacement.

Prints and writes a row for each test; ends with 1 if a test passes for theirs and not for ours.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = "tests/models/autoencoders/test_models_autoencoder_kl.py"
OUTPUT = ROOT / "tests/benchmarks/results/diffusers_own_tests.json"
LONGEST_REASON = 160  # characters


class Recorder:
    """A pytest plugin: puts `replacement` in the place of `original`, records the outcome of each test."""

    def __init__(self, original: type, replacement: type):
        self.original, self.replacement = original, replacement
        self.outcomes: dict[str, dict[str, str]] = {}  # by test: outcome, and why where it did not pass
        self.replaced = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        modules = {item.module for item in items}
        classes = {cls for module in modules for cls in vars(module).values() if isinstance(cls, type)}
        for place in modules | {cls for cls in classes if cls.__module__ in {m.__name__ for m in modules}}:
            for name, value in list(vars(place).items()):
                if value is self.original:
                    setattr(place, name, self.replacement)
                    self.replaced += 1

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            test = report.nodeid.partition("::")[2].replace("::", ".")
            self.outcomes[test] = {"outcome": report.outcome, "why": reason(report)}


def reason(report: Any) -> str:
    if report.outcome == "passed":
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr[2] if report.skipped else report.longrepr)
    return " ".join(text.split())[:LONGEST_REASON]


def run_here(checkout: str, file: str, name: str, replacement: str, output: str) -> None:
    """Run the tests in this process, as the script does in one of its own for each class."""
    sys.path.append(str(ROOT))  # at the end: `tests` is the package of the checkout
    import diffusers  # before the checkout's conftest.py puts its own source first
    import pytest

    module, _, ours = replacement.rpartition(".")
    recorder = Recorder(getattr(diffusers, name), getattr(importlib.import_module(module), ours))
    os.chdir(checkout)
    pytest.main([file, "-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore"], plugins=[recorder])
    if not recorder.replaced:
        raise SystemExit(f"{file}: nothing in it is bound to diffusers.{name}")
    found = {"diffusers": diffusers.__version__, "outcomes": recorder.outcomes}
    Path(output).write_text(json.dumps(found))


def run(checkout: Path, file: str, name: str, replacement: str) -> dict[str, Any]:
    """Run the tests in a new process: the diffusers version and {test: {outcome, why}}."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "outcomes.json"))
        command = [sys.executable, __file__, str(checkout), "--file", file, "--class", name]
        command += ["--replacement", replacement, "--run-here", output]
        done = subprocess.run(command, stdout=sys.stderr)
        if not Path(output).exists():
            raise SystemExit(f"{file} with {replacement}: pytest ended with {done.returncode} before it ran")
        return json.loads(Path(output).read_text())


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, str]]:
    """A row a test: its outcome for both, and why it did not pass."""
    rows = []
    for test in sorted(theirs.keys() | ours.keys()):
        one, other = (found.get(test, {"outcome": "missing", "why": ""}) for found in (theirs, ours))
        why = other["why"] or one["why"]
        rows.append({"test": test, "theirs": one["outcome"], "ours": other["outcome"], "why": why})
    return rows


def commit_of(checkout: Path) -> str | None:
    """The commit that a git checkout is at."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%H of %cs"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="a clone of github.com/huggingface/diffusers")
    parser.add_argument("--file", default=FILE, help="of tests, relative to the checkout")
    parser.add_argument("--class", dest="name", default="AutoencoderKL", help="of diffusers, that it tests")
    parser.add_argument("--replacement", default="kl_autoencoder.KLAutoencoder", help="with its package")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="a .json")
    parser.add_argument("--run-here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_here:
        run_here(options.checkout, options.file, options.name, options.replacement, options.run_here)
        return 0
    arguments = (options.checkout.resolve(), options.file, options.name)
    theirs, ours = (run(*arguments, whose) for whose in (f"diffusers.{options.name}", options.replacement))
    rows = compare(theirs["outcomes"], ours["outcomes"])
    lost = [row["test"] for row in rows if row["theirs"] == "passed" != row["ours"]]
    for row in rows:
        print(f"{row['theirs']:8} {row['ours']:8} {row['test']}  {row['why']}")
    count = {
        whose: {kind: sum(row[whose] == kind for row in rows) for kind in ("passed", "failed", "skipped")}
        for whose in ("theirs", "ours")
    }
    about = {
        "file": options.file,
        "tests of": commit_of(options.checkout),
        "class": f"diffusers.{options.name} {theirs['diffusers']}",
        "replacement": options.replacement,
        "date": date.today().isoformat(),
    }
    found = {"about": about, "count": count, "passes for theirs only": lost, "tests": rows}
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{count}\npasses for theirs only: {', '.join(lost) or 'none'}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
