"""Every error is one line and a documented exit code."""

from __future__ import annotations

import importlib.metadata
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doge_deploy import __version__
from doge_deploy.cli.main import run_command

BAD: dict[str, tuple[list[str], int, str]] = {
    "unknown command": (["explode"], 2, "No such command 'explode'"),
    "unknown option": (["export", "doge-tiny", "-o", "x", "--fast"], 2, "No such option"),
    "no output": (["export", "doge-tiny"], 2, "Missing option '-o'"),
    "unknown dtype": (["export", "doge-tiny", "-o", "x", "--dtype", "int3"], 2, "'int3' is not one of"),
    "no such model": (["export", "./nowhere", "-o", "x"], 2, "no such directory"),
    "unknown key": (["export", "doge-tiny", "-o", "x", "--set", "dtpye=fp16"], 2, "did you mean 'dtype'"),
    "unknown value": (["export", "doge-tiny", "-o", "x", "--set", "dtype=fp8"], 2, "fp8"),
    "no such config": (["export", "doge-tiny", "-o", "x", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    "no such bundle": (["verify", "nowhere"], 2, "is not a directory"),
    "nothing to say": (["generate", "nowhere"], 2, "give --prompt"),
    "bench: no bundle": (["bench"], 2, "Missing argument 'BUNDLE...'"),
    "bench: not a bundle": (["bench", "nowhere"], 2, "nowhere is not a directory"),
    "bench: not a number": (["bench", "x", "--prompt-length", "128,many"], 2, "'many' is not a whole number from 1 up"),
    "bench: no row": (["bench", "x", "--batch", "0"], 2, "'0' is not a whole number from 1 up"),
    "bench: no such baseline": (
        ["bench", "x", "--against", "transformers,llama"],
        2,
        "'llama' is not one of transformers, naive",
    ),
    "bench: a file that cannot be written": (["bench", "x", "--json", "nowhere/report.json"], 2, "nowhere/report.json"),
    "a decimal comma": (
        ["build", "x", "--compute-capability", "8,9"],
        2,
        "'8,9' is not a compute capability: write 8.9",
    ),
    "a checkpoint, no bundle": (["serve", "doge-tiny"], 2, "as `doge-deploy export MODEL -o doge-tiny` writes one"),
    "too many layers": (["export", "doge-tiny", "-o", "x", "--num-layers", "9"], 2, "num_layers=9"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == code
    error = capfd.readouterr().err
    assert error.startswith("doge-deploy: error: ")
    assert message in error
    assert error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_unknown_key_of_a_config_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("export:\n  kv_cahce: static\n")
    assert run_command(["export", "doge-tiny", "-o", str(tmp_path / "b"), "--config", str(tmp_path / "c.yaml")]) == 2
    assert "kv_cahce" in capfd.readouterr().err


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(place: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--debug", "inspect", "nowhere"] if place == "before" else ["inspect", "nowhere", "--debug"]
    with pytest.raises(SystemExit) as stop:
        from doge_deploy.cli.main import main

        main(command)
    assert stop.value.code == 2
    assert "Traceback" in capfd.readouterr().err


def test_the_callers_handler_of_signals_comes_back() -> None:
    from doge_deploy.cli.main import main

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert signal.getsignal(signal.SIGTERM) is before


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert __version__ in capfd.readouterr().out


@pytest.mark.parametrize("command", [["export", "doge-tiny", "-o", "x"], ["verify", "x"]], ids=lambda c: c[0])
def test_a_missing_package_is_exit_code_4(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run_command(command) == 4
    assert "pip install 'doge-deploy[export]'" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_runtime_is_exit_code_4(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run_command(["generate", str(tiny_bundle), "--prompt", "x"]) == 4
    assert "pip install 'doge-deploy[cpu]'" in capfd.readouterr().err


END = """
import atexit, sys, threading, time
import {library}

gone = []

def late():
    time.sleep(0.2)
    gone.append("thread")
    print("a thread")

def registered():
    print("what was registered", gone)

atexit.register(registered)
threading.Thread(target=late).start()
sys.argv = ["doge-deploy", *sys.argv[1:]]
from doge_deploy.cli.main import main
main()
"""


@pytest.mark.parametrize("library", ["onnx", "numpy"])
@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["--nothing"], 2)], ids=["good", "usage"])
def test_the_end_waits_and_does_what_was_registered(library: str, arguments: list[str], code: int) -> None:
    """Where onnx or torch is loaded, the process does not take its modules apart; all else is as in any end."""
    command = [sys.executable, "-c", END.format(library=library), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stdout.splitlines() if "version" not in line]
    assert lines[:2] == ["a thread", "what was registered ['thread']"]
    assert "leaked" not in done.stderr and "Traceback" not in done.stderr
