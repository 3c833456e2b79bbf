"""Versions that are written in two places agree: of tools, of Python, of the package."""

import re

import yaml

from tests.conftest import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_a_commit_is_checked_by_the_ruff_of_ci():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    used = {tool for hook in hooks for tool in hook["additional_dependencies"] if tool.startswith("ruff")}
    assert used == set(re.findall(r'"(ruff==[\d.]+)"', PROJECT))


def test_ci_runs_on_every_python_that_the_package_supports():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["check"]
    versions = job["strategy"]["matrix"]["python"]
    assert versions == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert re.search(r'requires-python = ">=([\d.]+)"', PROJECT)[1] == versions[0]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]


def test_the_newest_numbered_change_is_the_version():
    changes = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (
        re.search(r"^## (\d\S*)", changes, re.MULTILINE)[1]
        == re.search(r'^version = "(.*)"', PROJECT, re.M)[1]
    )
