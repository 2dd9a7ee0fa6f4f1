"""What runs in a base installation, and what the other commands say there."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from base_install import MISSING, canonical, requirements_of
from bundles import shared_bundle

from doge_deploy.devices import packages
from doge_deploy.errors import MissingDependencyError

SCRIPT = Path(__file__).with_name("base_install.py")


def run(*arguments: str, extras: str = "cpu") -> subprocess.CompletedProcess[str]:
    """`doge-deploy ARGUMENTS` in an installation with the base and `extras`."""
    return subprocess.run([sys.executable, str(SCRIPT), extras, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("prompt", [["--prompt", "A list"], ["--chat", "--prompt", "A list"]], ids=["text", "chat"])
def test_generate(prompt: list[str], tiny_bundle: Path) -> None:
    for layout in ("static", "growing"):
        done = run("generate", str(tiny_bundle), *prompt, "--max-new-tokens", "4", "--layout", layout)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_inspect(tiny_bundle: Path) -> None:
    done = run("inspect", str(tiny_bundle), extras="")
    assert done.returncode == 0 and "every sha256 as in the manifest" in done.stdout, done.stderr


def test_doctor(tiny_bundle: Path) -> None:
    for arguments in (["doctor"], ["doctor", str(tiny_bundle)], ["doctor", "doge-tiny", "--json"]):
        done = run(*arguments)
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_plugins_list() -> None:
    assert "CDMoE" in run("plugins", "list", extras="").stdout


@pytest.mark.parametrize(("arguments", "says", "extra"), MISSING.values(), ids=MISSING.keys())
def test_one_line_names_the_package_and_the_extra(arguments: list[str], says: str, extra: str) -> None:
    done = run(*arguments)
    assert done.returncode == 4, done
    assert re.fullmatch(rf"doge-deploy: error: .*{re.escape(says)}.*'doge-deploy\[{extra}\]'.*\n", done.stderr), done


def test_generate_without_a_runtime(tiny_bundle: Path) -> None:
    done = run("generate", str(tiny_bundle), "--prompt", "x", extras="")
    assert (done.returncode, done.stderr) == (
        4,
        "doge-deploy: error: ONNX Runtime is not installed: pip install 'doge-deploy[cpu]'\n",
    )


def test_generate_in_bfloat16_needs_graphs() -> None:
    bundle = shared_bundle("doge-tiny", dtype="bf16")
    done = run("generate", str(bundle), "--prompt", "x")
    assert done.returncode == 4 and "a bfloat16 bundle on the CPU needs onnx" in done.stderr
    assert "pip install 'doge-deploy[graph]'" in done.stderr
    done = run("generate", str(bundle), "--prompt", "x", "--max-new-tokens", "2", extras="cpu,graph")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("require", [packages.require_export_packages, packages.require_graph_packages])
def test_an_extra_brings_what_its_message_says(require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each package in turn is the missing one."""
    asked: list[str] = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: asked.append(name) or "1")
    require("x")
    assert asked
    for name in tuple(asked):

        def version(other: str, name: str = name) -> str:
            if other == name:
                raise importlib.metadata.PackageNotFoundError(name)
            return "1"

        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(MissingDependencyError) as caught:
            require("x")
        found = re.fullmatch(
            r"x needs (.+), which is not installed: pip install 'doge-deploy\[(\w+)\]'", str(caught.value)
        )
        assert found and found[1] == name
        assert canonical(name) in {canonical(requirement) for requirement in requirements_of(found[2])}
