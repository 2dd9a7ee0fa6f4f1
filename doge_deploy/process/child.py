"""A child process that speaks JSON lines, seen from its parent; `worker.py` is the other end.

The child may crash, be killed, hang or print what it likes: whatever happens to it becomes a `ChildError`, one line
that ends with the last lines of its standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Self

from doge_deploy import errors

PARENT_VARIABLE = "DOGE_DEPLOY_PARENT_PID"
"""Tells a child whose end is its own."""

GRACE_S = 10.0
"""Seconds that a child has to end by itself once it has nothing more to do."""

_LOG_BYTES, _LOG_LINES, _LINE_CHARACTERS = 65536, 3, 300
"""How much of the end of a log is read, and how much of that is quoted."""


class ChildError(Exception):
    """A child did not do what it was started for.

    Attributes:
        reason: what happened to it: `was ended by signal 11 (SIGSEGV)`.
        log: the last lines of its standard error that are not empty.
        status: with which it ended by itself; None where it did not.
    """

    def __init__(self, reason: str, log: Sequence[str] = (), status: int | None = None) -> None:
        super().__init__(f"{reason}; its log ends with: {' | '.join(log)}" if log else f"{reason}; its log is empty")
        self.reason = reason
        self.log = tuple(log)
        self.status = status


class ChildTimeoutError(ChildError):
    """A child did not answer, or did not end, in the time that it was given."""


class Child:
    """A process that answers requests, or sends events, one JSON object a line.

    A context manager: what is left of the process afterwards is ended. On Linux it ends with the thread that started
    it, however that ends, so start it from a thread that lives as long as the work. Standard error goes to a file, so
    that neither a chatty child waits nor the end of its log is lost.

    Args:
        command: program and arguments; see `worker_command`.
        environment: all of its variables; those of this process where None.

    Raises:
        ChildError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        self._log = _log_file()  # closed in __exit__
        variables = {**(os.environ if environment is None else environment), PARENT_VARIABLE: str(os.getpid())}
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=variables,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            self._log.close()
            raise ChildError(f"cannot be started: {error.strerror}") from None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        """It has not ended yet."""
        return self._process.poll() is None

    def _read(self) -> None:
        """Collect what the child writes, so that it never waits for us, and we can stop waiting for it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one object. That the child is dead is seen when its answer is received."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next object that the child sent; None where it sends no more.

        Raises:
            DogeDeployError: the child reports an error of this package: the same one, see `worker.error_message`.
            ChildError: it sent something else. ChildTimeoutError: nothing for `timeout_s` seconds.
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self.kill()
            raise ChildTimeoutError(f"did not answer within {timeout_s:.0f} s", self._log_end()) from None
        if line is None:
            self._lines.put(None)  # it is the last one for whoever asks again
            return None
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self.kill()
            raise ChildError(f"sent {line.strip()[:80]!r}, which is not a JSON object", self._log_end())
        if "error" in message:
            raise getattr(errors, message["error"])(message["message"])
        return message

    def ask(self, message: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Send one object and wait for the answer.

        Raises:
            DogeDeployError: see `receive`.
            ChildError: there is none.
        """
        self.send(message)
        answer = self.receive(timeout_s)
        if answer is None:
            raise self.failure()
        return answer

    def finish(self, grace_s: float = GRACE_S) -> None:
        """Tell the child that there is nothing more to do, and wait until it has ended.

        Raises:
            ChildError: it crashes. ChildTimeoutError: it does not end within `grace_s` seconds.
        """
        if not self._end(grace_s):
            raise ChildTimeoutError(f"did not end within {grace_s:.0f} s of its last answer", self._log_end())
        if self._process.returncode:
            raise self.failure()

    def failure(self) -> ChildError:
        """What became of a child that stopped to answer."""
        if not self._end(GRACE_S):
            return ChildTimeoutError("closed its output without an answer and did not end", self._log_end())
        status, log = self._process.returncode, self._log_end()
        if status < 0:
            return ChildError(_signal_text(-status), log)
        return ChildError(f"ended with status {status}", log, status)

    def _log_end(self) -> list[str]:
        """The last lines of its standard error that are not empty; a long line is cut. Only once it has ended: until
        then it writes at the position that this moves.
        """
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(size - _LOG_BYTES, 0))
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        return [line.strip()[:_LINE_CHARACTERS] for line in lines if line.strip()][-_LOG_LINES:]

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def _end(self, grace_s: float) -> bool:
        """Close its input and wait; kill it where that does not help, and return False."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it died with a message unread, which closing would send again
            self._process.stdin.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        self._end(GRACE_S)
        # a grandchild may hold the pipe open: nothing that it writes is of interest
        self._reader.join(1.0)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()
        self._log.close()


def _log_file() -> IO[bytes]:
    """A file without a name; where no folder can be written nothing is kept, and the log counts as empty."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


def worker_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package as a worker."""
    return [sys.executable, "-m", module, *arguments]


def _signal_text(number: int) -> str:
    try:
        return f"was ended by signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"was ended by signal {number}"
