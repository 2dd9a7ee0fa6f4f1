"""The other end of a worker process."""

from __future__ import annotations

import os
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Self

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.process.child import Child, ChildError, worker_command

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
        variables = {**dict.fromkeys(THREAD_VARIABLES, str(threads)), "TOKENIZERS_PARALLELISM": "false"}
        self._started_ns = perf_counter_ns()
        self._child = Child(worker_command("doge_deploy.bench.worker"), environment={**os.environ, **variables})

    @property
    def pid(self) -> int:
        return self._child.pid

    def age_ns(self) -> int:
        """Time since the process was started."""
        return perf_counter_ns() - self._started_ns

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            DogeDeployError: what the worker raised, in its own class.
            UnsupportedModelError: the worker died.
        """
        try:
            return self._child.ask({"do": do, **request})
        except ChildError as error:
            raise UnsupportedModelError(f"bench: the process that was to {do} {error}") from None

    def __enter__(self) -> Self:
        self._child.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.__exit__(kind, error, trace)
