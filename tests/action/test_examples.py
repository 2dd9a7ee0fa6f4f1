"""The examples of docs/parity-in-ci.md, as far as they run without somebody's runner."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parity-in-ci.md").read_text(encoding="utf-8")
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def block(title: str) -> str:
    """The first block of code under a heading."""
    found = re.search(rf"^## {title}\n.*?^```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def commands() -> list[str]:
    """Every command line of `doge-deploy` on the page."""
    return [line.strip(" -$\t") for line in PAGE.splitlines() if re.match(r"^(\s+- |\t|\$ )doge-deploy ", line)]


@pytest.mark.parametrize("line", commands())
def test_every_command_line_is_understood(line: str) -> None:
    _, name, *words = shlex.split(line)
    command = getattr(importlib.import_module(f"doge_deploy.cli.{name}"), name)
    command.make_context(name, words)


def test_the_page_has_commands() -> None:
    assert len(commands()) >= 5


def test_the_workflow_gives_inputs_that_the_action_has() -> None:
    steps = yaml.safe_load(block("GitHub"))["jobs"]["parity"]["steps"]
    given = steps[-1]["with"]
    assert set(given) <= set(ACTION["inputs"])
    _, *words = ["export", given["checkpoint"], *given["export-options"].split(), "--output", "b"]
    importlib.import_module("doge_deploy.cli.export").export.make_context("export", words)


def test_the_table_of_inputs_is_that_of_the_action() -> None:
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]*)\|", block_of_inputs(), re.MULTILINE)
    told = {name: default.strip(" `") for names, default in rows for name in re.findall(r"`([\w-]+)`", names)}
    assert told == {name: entry["default"] for name, entry in ACTION["inputs"].items()}


def block_of_inputs() -> str:
    return PAGE[PAGE.index("| Input |") : PAGE.index("Outputs are")]


TOOL = """#!/bin/bash
echo "doge-deploy $*" >> log
case $1 in
  export) mkdir -p bundle; touch bundle/manifest.json;;
  verify) touch report.json report.html report.xml; exit ${VERDICT:-0};;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with a checkpoint, and stand-ins for the programs."""
    said = '#!/bin/bash\necho "${0##*/} $*" >> log\n'
    for name, text in (("doge-deploy", TOOL), ("pip", said), ("git", said)):
        (tmp_path / "programs").mkdir(exist_ok=True)
        (tmp_path / "programs" / name).write_text(text)
        (tmp_path / "programs" / name).chmod(0o755)
    (tmp_path / "checkpoint").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "checkpoint" / name).touch()
    return tmp_path


def run(folder: Path, *command: str, verdict: int = 0) -> int:
    path = f"{folder / 'programs'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path, "VERDICT": str(verdict)}).returncode


def log(folder: Path) -> list[str]:
    """First two words of what was run."""
    return [" ".join(line.split()[:2]) for line in (folder / "log").read_text().splitlines()]


@pytest.mark.parametrize("verdict", [0, 1])
def test_the_job_of_gitlab_runs_and_ends_with_the_verdict(verdict: int, folder: Path) -> None:
    job = yaml.safe_load(block("GitLab"))["parity"]
    assert run(folder, "bash", "-eo", "pipefail", "-c", "\n".join(job["script"]), verdict=verdict) == verdict
    assert log(folder) == ["git clone", "pip install", "doge-deploy export", "doge-deploy verify"]
    kept = [*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]]
    assert all((folder / name).exists() for name in kept)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_does_only_what_changed(folder: Path) -> None:
    (folder / "Makefile").write_text(block("Make") + "\n.DELETE_ON_ERROR:\n")
    assert run(folder, "make", "parity", verdict=1) != 0
    assert not (folder / "report.json").exists()
    assert (folder / "report.html").exists()
    assert run(folder, "make", "parity") == 0
    assert log(folder) == ["doge-deploy export", "doge-deploy verify", "doge-deploy verify"]
    assert run(folder, "make", "parity") == 0
    assert len(log(folder)) == 3


def test_the_test_of_pytest_is_python() -> None:
    (function,) = ast.parse(block("pytest")).body
    assert isinstance(function, ast.FunctionDef)
    assert [argument.arg for argument in function.args.args] == ["doge_parity"]
