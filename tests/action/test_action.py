"""action.yml: its steps are run by bash as a runner does it, with files in place of a runner's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundles import broken_copy, edit_tensor

ROOT = Path(__file__).parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]

PYTHON = """#!/bin/bash
if [ "$1 $2" = "-m pip" ]; then printf '%s\\n' "$@" > "$RUNNER_TEMP/pip"; else exec "{python}" "$@"; fi
"""
"""What was to be installed is written down; the package is here already."""

TOOL = """#!/bin/bash
printf '%s\\n' "$@" > "$RUNNER_TEMP/$1"
if [ -z "$ONLY_TELL" ]; then exec "{python}" -m doge_deploy.cli "$@"; fi
"""


@dataclass
class Runner:
    """Runs the steps of the action with these inputs; `uses` steps are left out."""

    folder: Path
    inputs: dict[str, str]
    only_tell: bool = False
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    output: str = ""

    def __post_init__(self) -> None:
        programs = self.folder / "programs"
        programs.mkdir(parents=True)
        for name, text in (("python", PYTHON), ("doge-deploy", TOOL)):
            (programs / name).write_text(text.format(python=sys.executable))
            (programs / name).chmod(0o755)
        (self.folder / "temp").mkdir()
        self.summary = self.folder / "summary.md"
        self.summary.write_text("of another step\n")
        self.inputs = {name: entry.get("default", "") for name, entry in ACTION["inputs"].items()} | self.inputs

    def value(self, text: str) -> str:
        """An expression of the kinds that the action has."""

        def one(match: re.Match[str]) -> str:
            kind, *names = match[1].strip().split(".")
            if kind == "inputs":
                return self.inputs[names[0]]
            if kind == "steps":
                return self.outputs[names[0]][names[2]]
            return {"github.action_path": str(ROOT), "runner.temp": str(self.folder / "temp")}[match[1].strip()]

        return re.sub(r"\$\{\{(.*?)\}\}", one, text)

    def run(self) -> int:
        """Exit code of the first step that fails."""
        for number, step in enumerate(STEPS):
            if "run" not in step:
                continue
            assert "${{" not in step["run"], "an input in a script is a script: it comes by the environment"
            script, told = self.folder / f"step{number}.sh", self.folder / f"output{number}"
            script.write_text(step["run"])
            told.touch()
            environment = {
                **os.environ,
                "PATH": f"{self.folder / 'programs'}{os.pathsep}{os.environ['PATH']}",
                "RUNNER_TEMP": str(self.folder / "temp"),
                "GITHUB_OUTPUT": str(told),
                "GITHUB_STEP_SUMMARY": str(self.summary),
                "ONLY_TELL": "1" if self.only_tell else "",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                **{name: self.value(value) for name, value in step.get("env", {}).items()},
            }
            command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=self.folder)
            self.output += done.stdout + done.stderr
            if done.returncode:
                return done.returncode
            if "id" in step:
                self.outputs[step["id"]] = dict(line.split("=", 1) for line in told.read_text().splitlines())
        return 0

    def words(self, program: str) -> list[str]:
        """What `pip`, `export` or `verify` was given."""
        return (self.folder / "temp" / program).read_text().splitlines()


FAST = "--layout growing\n  --greedy-steps 2"


def test_a_good_bundle_passes_with_every_report(tiny_bundle: Path, tmp_path: Path) -> None:
    runner = Runner(tmp_path / "r", {"bundle": str(tiny_bundle), "verify-options": FAST})
    assert runner.run() == 0, runner.output
    report = Path(runner.outputs["export"]["report"])
    assert {path.name for path in report.iterdir()} == {"report.html", "report.xml", "report.json"}
    assert runner.summary.read_text().startswith("of another step\n### ✅")


def test_a_bad_bundle_fails_with_every_report(tiny_bundle: Path, tmp_path: Path) -> None:
    def spoil(path: Path) -> None:
        edit_tensor(path, "model.norm.weight", lambda tensor: tensor.mul_(1.01))

    bundle = broken_copy(tiny_bundle, tmp_path / "bundle", weights=spoil)
    inputs = {"bundle": str(bundle), "checkpoint": "doge-tiny", "verify-options": FAST}
    runner = Runner(tmp_path / "r", inputs)
    assert runner.run() == 1, runner.output
    report = Path(runner.outputs["export"]["report"])
    assert {path.name for path in report.iterdir()} == {"report.html", "report.xml", "report.json"}
    assert "### ❌" in runner.summary.read_text()
    options = ["--layout", "growing", "--greedy-steps", "2", "--reference", "doge-tiny"]
    assert runner.words("verify")[:8] == ["verify", str(bundle), *options]


def test_inputs_become_options(tmp_path: Path) -> None:
    inputs = {
        "checkpoint": "my model; exit 7",
        "export-options": "--dtype fp16\n--kv-cache growing",
        "baseline": "$(false).json",
        "recording": "a b.rec",
        "extras": "cpu",
        "pip-options": "--quiet",
    }
    runner = Runner(tmp_path / "r", inputs, only_tell=True)
    assert runner.run() == 0, runner.output
    constraints = str(ROOT / "constraints.txt")
    assert runner.words("pip") == ["-m", "pip", "install", "--constraint", constraints, "--quiet", f"{ROOT}[cpu]"]
    bundle = runner.outputs["export"]["bundle"]
    options = ["--output", bundle, "--force", "--dtype", "fp16", "--kv-cache", "growing"]
    assert runner.words("export") == ["export", "my model; exit 7", *options]
    assert runner.words("verify")[:6] == ["verify", bundle, "--recording", "a b.rec", "--baseline", "$(false).json"]


def test_neither_checkpoint_nor_bundle_is_refused(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "r", {}, only_tell=True)
    assert runner.run() == 2
    assert "::error::give the input checkpoint or bundle" in runner.output


def test_reports_are_uploaded_whatever_the_verdict() -> None:
    upload = STEPS[-1]
    assert upload["uses"].startswith("actions/upload-artifact@")
    assert upload["if"].startswith("always()")


@pytest.mark.parametrize("step", [step for step in STEPS if "run" in step], ids=lambda step: step["name"])
def test_a_step_says_its_shell(step: dict[str, Any]) -> None:
    assert step["shell"] == "bash", "a composite action must"
