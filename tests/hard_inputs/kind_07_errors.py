"""Errors that nobody raises on purpose, and streams that end: what a process leaves behind, by its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hard_inputs.frame import DEMO, Case, Ended, Outcome, equal, right, wrong

KIND = "7 errors that escape"

RAISED = {
    "disk full": ("OSError(28, 'No space left on device', 'f')", 2, "f: No space left on device"),
    "disk full, no name": ("OSError(28, 'No space left on device')", 2, "No space left on device"),
    "permission": ("PermissionError(13, 'Permission denied', 'f')", 2, "f: Permission denied"),
    "a file that vanished": ("FileNotFoundError(2, 'No such file or directory', 'f')", 2, "f: No such file"),
    "a broken disk": ("OSError(5, 'Input/output error', 'f')", 4, "f: Input/output error"),
    "too many open files": ("OSError(24, 'Too many open files', 'f')", 4, "Too many open files"),
    "no memory": ("MemoryError()", 4, "out of memory"),
    "no memory, in torch": ('RuntimeError("can\'t allocate memory: you tried")', 4, "out of memory"),
    "nested too deeply": ("RecursionError('maximum recursion depth')", 3, "nested too deeply"),
    "a library's RuntimeError": ("RuntimeError('node 3\\nis broken')", 3, "RuntimeError: node 3 is broken"),
    "a bare Exception": ("Exception('while deserializing')", 3, "Exception: while deserializing"),
    "a missing shared library": ("ImportError('libcuda.so.1: not found')", 4, "libcuda.so.1"),
    "a fault of the tool": ("KeyError('x')", 70, "unexpected KeyError"),
    "a library that exits with 1": ("SystemExit(1)", 70, "a library ended the command"),
    "the end of an input": ("EOFError('too short')", 70, "unexpected EOFError"),
}


def process(code: str, *arguments: object, **streams: object) -> Ended:
    """`main()` in a process of its own, after some Python."""
    command = [sys.executable, "-c", f"{code}\nfrom doge_deploy.cli.main import main\nmain()", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    done = subprocess.run(command, **options)  # type: ignore[call-overload]
    return Ended(done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode())


def raising(expression: str) -> str:
    return f"from doge_deploy.cli import commands\ndef run(args): raise {expression}\ncommands.run = run"


def gone(*arguments: object) -> Outcome:
    """Standard output is a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = process("", *arguments, stdout=writing)
    finally:
        os.close(writing)
    return equal((ended.code, ended.errors), (141, ""))


def full(*arguments: object) -> Outcome:
    with open("/dev/full", "wb") as disk:
        return process("", *arguments, stdout=disk).refusal(2, "No space left on device")


INTERRUPT = """
import os, signal, sys
class At:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, At())
"""


def interrupted(name: str, *arguments: object) -> Outcome:
    ended = process(INTERRUPT.format(name=name), *arguments)
    if "Traceback" in ended.errors or ended.code != 130:
        return wrong(f"exit {ended.code}: {ended.errors[-200:]}")
    return right()


def closed(stream: int) -> Outcome:
    code = "from doge_deploy.cli.main import main; main()"
    command = ["bash", "-c", f'exec "$@" {stream}>&-', "bash", sys.executable, "-c", code, "inspect", "nowhere"]
    done = subprocess.run(command, capture_output=True)
    return equal((done.returncode, b"Traceback" in done.stderr), (2, False))


def cases() -> list[Case]:
    def raises(expression: str, code: int, words: str) -> Callable[[Path], Outcome]:
        return lambda folder: process(raising(expression), "inspect", "x").refusal(code, words)

    return [
        *(Case(name, raises(*row)) for name, row in RAISED.items()),
        Case("no reader: --help", lambda folder: gone("--help")),
        Case("no reader: plugins list", lambda folder: gone("plugins", "list")),
        Case("no reader: doctor", lambda folder: gone("doctor", "--target", "jetson")),
        Case("a full disk: --version", lambda folder: full("--version")),
        Case("a full disk: plugins list", lambda folder: full("plugins", "list")),
        *(
            Case(f"Ctrl-C at the import of {name}", lambda folder, name=name: interrupted(name, "inspect", DEMO))
            for name in ("doge_deploy.cli.streams", "click", "doge_deploy.cli.inspect", "doge_deploy.bundle.manifest")
        ),
        *(Case(f"stream {number} closed", lambda folder, number=number: closed(number)) for number in range(3)),
    ]
