"""Commands on a filesystem that fails at a chosen call: see `faults/failing_filesystem.c`.

Commands run in forks of one process that has imported everything and traced every graph once (a trace writes no file),
so that a point takes a second and not ten.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

SOURCE = Path(__file__).parent / "faults" / "failing_filesystem.c"

Snapshot = dict[str, str]


class State(ctypes.Structure):
    """`struct state` of the C file."""

    _fields_ = (
        ("at", ctypes.c_int),
        ("count", ctypes.c_int),
        ("error", ctypes.c_int),
        ("for_good", ctypes.c_int),
        ("failed", ctypes.c_int),
        ("name", ctypes.c_char * 100),
    )


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    said: str
    calls: int
    failed: int
    call: str
    """The function that failed first."""


def compile_library(folder: Path) -> Path:
    library = folder / "failing_filesystem.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


class Commands:
    """The process whose forks run commands."""

    def __init__(self, process: subprocess.Popen[str], state: State, output: Path) -> None:
        self._process, self._state, self._output = process, state, output

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, *arguments: object, at: int = 0, error: int = errno.ENOSPC, for_good: bool = False) -> Ended:
        """Run `doge-deploy ARGUMENTS`; its `at`-th call fails, and, `for_good`, later ones that need space too."""
        state = self._state
        state.at, state.count, state.error, state.for_good, state.failed, state.name = at, 0, error, for_good, 0, b""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        said = self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""
        return Ended(code, said, state.count, state.failed, state.name.decode())


@contextmanager
def commands(folder: Path, work: Path) -> Iterator[Commands]:
    """Commands that may fail below `work`; `folder` is for what the harness itself needs."""
    file, output = folder / "state", folder / "output"
    file.write_bytes(bytes(ctypes.sizeof(State)))
    environment = {
        **os.environ,
        "LD_PRELOAD": str(compile_library(folder)),
        "FAULT_STATE": str(file),
        "FAULT_FOLDER": str(work),
        "OMP_NUM_THREADS": "1",
    }
    with (
        file.open("r+b") as handle,
        subprocess.Popen(
            [sys.executable, __file__, str(output)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process,
    ):
        run = Commands(process, State.from_buffer(mmap.mmap(handle.fileno(), 0)), output)
        try:
            yield run
        finally:
            run.close()


def snapshot(folder: Path) -> Snapshot:
    """Every file below a folder with its hash, every folder with nothing."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def serve(output: str, answers: TextIO) -> None:
    """Answer each line of arguments with the exit code of the command, which a fork runs."""
    from doge_deploy.cli.main import run_command
    from doge_deploy.graph import write as module

    original, traced = module.trace, {}

    def trace(facts: Any, signature: Any, **options: Any) -> Any:
        return traced.pop(repr((facts, signature, options)), None) or original(facts, signature, **options)

    module.trace = trace
    for line in sys.stdin:
        arguments = json.loads(line)
        if arguments[0] == "trace":  # in this process, for the forks that follow
            traced_now: dict[str, Any] = {}

            def note(facts: Any, signature: Any, into: dict[str, Any] = traced_now, **options: Any) -> Any:
                into[repr((facts, signature, options))] = original(facts, signature, **options)
                return original(facts, signature, **options)

            module.trace = note
            code = run_command(arguments[1:])
            module.trace = trace
            traced.update(traced_now)
        else:
            child = os.fork()
            if child == 0:
                target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(target, 1)
                os.dup2(target, 2)
                os._exit(run_command(arguments))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, file=answers, flush=True)


if __name__ == "__main__":
    to_parent = os.fdopen(os.dup(1), "w")
    for stream in (1, 2):  # of this process itself; a fork writes into the file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    serve(sys.argv[1], to_parent)
