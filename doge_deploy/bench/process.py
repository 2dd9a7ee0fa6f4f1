"""The other end of a worker process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from time import perf_counter_ns
from types import TracebackType
from typing import Any

from doge_deploy import errors

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""Set alike for every candidate, beside the thread counts that its libraries are told."""


class WorkerProcess:
    """A fresh Python process that answers requests (see `worker.py`); a context manager that ends it.

    Args:
        threads: for BLAS and OpenMP, through the environment.
    """

    def __init__(self, threads: int) -> None:
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (closed in __exit__)
        self._started_ns = perf_counter_ns()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "doge_deploy.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **{name: str(threads) for name in THREAD_VARIABLES}, "TOKENIZERS_PARALLELISM": "false"},
            encoding="utf-8",
        )

    def age_ns(self) -> int:
        """Time since the process was started."""
        return perf_counter_ns() - self._started_ns

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            DogeDeployError: what the worker raised, in its own class.
            UnsupportedModelError: the worker died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._death(do)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        return answer

    def _death(self, do: str) -> errors.DogeDeployError:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().split("\n")[-1]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return errors.UnsupportedModelError(f"bench: the process that was to {do} ended with {how}: {said}")

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died with a request unread, which close would send again
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
