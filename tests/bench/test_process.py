"""Processes that candidates live in."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from doge_deploy.bench.process import THREAD_VARIABLES, WorkerProcess
from doge_deploy.errors import BrokenBundleError, UnsupportedModelError


def candidate(path: Path) -> dict[str, object]:
    return {
        "name": "x",
        "kind": "bundle",
        "path": str(path),
        "dtype": "float32",
        "max_length": 64,
        "vocab_size": 100,
        "layout": "static",
    }


def test_an_error_keeps_its_class_and_its_line(tmp_path: Path) -> None:
    with WorkerProcess(1) as process, pytest.raises(BrokenBundleError, match="not a bundle of"):
        process.ask("load", candidate=candidate(tmp_path), threads=1)


@pytest.mark.parametrize("buried", [False, True], ids=["dying", "dead"])
def test_a_dead_process_is_an_error_that_says_how_it_died(buried: bool) -> None:
    with WorkerProcess(1) as process:
        process.ask("memory")
        os.kill(process.pid, signal.SIGKILL)
        if buried:  # then the request cannot even be written, and is still there to be written at the end
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(UnsupportedModelError, match=r"was to memory was ended by signal 9 \(SIGKILL\)"):
            process.ask("memory")


def test_a_bug_in_the_worker_is_reported_with_its_last_line() -> None:
    with WorkerProcess(1) as process, pytest.raises(UnsupportedModelError, match=r"status 1; .*KeyError: 'dance'$"):
        process.ask("dance")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_the_process_and_not_of_its_parent() -> None:
    ballast = np.ones(60_000_000)  # 480 MB
    with WorkerProcess(1) as process:
        peak = process.ask("memory")["peak_bytes"]
    assert peak < ballast.nbytes / 2


def test_threads_are_limited_for_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with WorkerProcess(3) as process:
        environment = Path(f"/proc/{process.pid}/environ")
        if not environment.exists():
            pytest.skip("needs Linux's /proc")
        process.ask("memory")
        values = dict(line.split("=", 1) for line in environment.read_text().split("\0") if "=" in line)
    assert {name: values[name] for name in THREAD_VARIABLES} == dict.fromkeys(THREAD_VARIABLES, "3")
