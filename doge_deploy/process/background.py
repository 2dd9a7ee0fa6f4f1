"""One thing done by a thread of its own while the caller goes on.

It helps where the work leaves the interpreter: hashing and reading large pieces does, and so does ONNX Runtime while it
initialises a session. What computes in Python, or in a library that keeps the interpreter, only takes turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class InBackground(Generic[T]):
    """What `work` returns or raises, computed by a thread that begins at once.

    Args:
        work: takes nothing; whatever it raises is raised by `result`.
        name: of the thread.
        abandoned_at_exit: the end of the process does not wait for it. Only for work whose native part is plain C:
            Python ends such a thread where it comes back to the interpreter, which C++ takes for a crash.
    """

    def __init__(self, work: Callable[[], T], name: str, *, abandoned_at_exit: bool = False) -> None:
        self._work = work
        self._outcome: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=abandoned_at_exit)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._work()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Wait for it; may be asked for again. Ctrl-C ends the waiting, not the work."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome  # type: ignore[return-value]  # of T itself, which may be None
