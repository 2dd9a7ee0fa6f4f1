"""A child process that speaks JSON lines, seen from inside; `child.py` is the other end."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

from doge_deploy import errors
from doge_deploy.errors import DogeDeployError
from doge_deploy.process.child import PARENT_VARIABLE


class Channel:
    """Where answers and events go. Thread-safe: libraries may call from threads of their own."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Write one object; False where nobody reads any more."""
        with self._lock:
            try:
                self._stream.write(json.dumps(message) + "\n")
                self._stream.flush()
            except OSError:
                return False
        return True


def connect() -> Channel:
    """Take standard output for messages alone, and end with the parent.

    What anything else writes to standard output, libraries in C too, goes to standard error from now on.
    """
    _end_with_parent()
    sys.stdout.flush()
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    return channel


def serve(answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Answer one request a line until there are no more.

    Args:
        answer: request -> answer. Errors of this package are sent to the parent, where they are raised again; any other
            ends the process with its traceback.
    """
    channel = connect()
    for line in sys.stdin:
        try:
            message = answer(json.loads(line))
        except DogeDeployError as error:
            message = error_message(error)
        if not channel.send(message):
            return


def error_message(error: DogeDeployError) -> dict[str, str]:
    """The error for the parent, in the nearest of its classes that stands in `errors.py`."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return {"error": kind.__name__, "message": str(error)}


def _end_with_parent() -> None:
    """Linux ends this process when its parent ends, however that was killed. (Elsewhere the closed pipes do.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and ends us
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ.get(PARENT_VARIABLE, os.getppid())):  # it ended before that
            sys.exit(1)
