"""`doge-deploy`: runs a command and ends the process with its exit code.

Exit codes: 0 good; 1 mismatch; 2 usage; 3 unsupported or broken model or bundle; 4 missing dependency, device or
memory; 70 an error that nobody expected; 130 interrupted; 141 the reader of the output went away; 143 terminated.

Nothing but small modules of the standard library is imported before Ctrl-C is looked after.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

_SETTLE_SECONDS = 2.0
"""A second Ctrl-C within this time changes nothing, so that it cannot disturb the tidying up after the first."""


class _Signals:
    """Turns Ctrl-C and SIGTERM into exceptions, so that nothing half-written is left behind; a context manager that
    gives the earlier handlers back.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        """The exit code of the signal that came; None where there was none."""
        self._last = -_SETTLE_SECONDS
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job is not to hear of Ctrl-C
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _settling(self) -> bool:
        now = time.monotonic()
        settling = now - self._last < _SETTLE_SECONDS
        if not settling:
            self._last = now
        return settling

    def _interrupt(self, _number: int, _frame: object) -> None:
        self.asked = EXIT_INTERRUPTED
        if not self._settling():
            raise KeyboardInterrupt

    def _terminate(self, _number: int, _frame: object) -> None:
        self.asked = EXIT_TERMINATED
        if not self._settling():
            sys.exit(EXIT_TERMINATED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command and exits."""
    code = EXIT_INTERRUPTED
    try:
        with _Signals() as signals:
            args = list(sys.argv[1:] if arguments is None else arguments)
            # Taken off here so that it works before and after the command's name.
            debug = "--debug" in args
            code = run_command([arg for arg in args if arg != "--debug"], debug)
            if signals.asked is not None and code != 0:
                code = signals.asked  # a library made another exception of it
    except KeyboardInterrupt:
        pass
    if arguments is None and code == EXIT_INTERRUPTED:
        # What is left to do is Python's own. Ctrl-C there would print a traceback; and an interrupt that passed through
        # code run from a string, as dataclasses make it, would end the process by the signal although it was handled:
        # CPython remembers it (`unhandled_keyboard_interrupt` in Modules/main.c).
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _leave(code)
    if arguments is None:
        # Python would look for unreachable objects among all that there is, several times.
        if not sys.modules.keys() & {"torch", "onnx"}:
            gc.freeze()
        else:  # their extensions count what is left of them, and would report what was not looked for
            _end(code)
    sys.exit(code)


def _end(code: int) -> NoReturn:
    """End the process as Python does, up to the point where it takes its modules apart: with PyTorch that takes longer
    than many an export writes.

    Threads that are no daemons are waited for, and what was registered for the end is done, in this order. Both are
    called by the names by which Python itself calls them; so end the children of `multiprocessing`, too.
    """
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        _leave(code)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run_command(args: list[str], debug: bool = False) -> int:
    """Run `doge-deploy ARGS`, errors to standard error as one line; the exit code."""
    try:
        from doge_deploy.cli.streams import flush, open_closed_streams

        open_closed_streams()
        from doge_deploy.cli.commands import run

        code = run(args)
        flush()
    except BaseException as error:  # the one place where every error ends
        from doge_deploy.cli.endings import end

        return end(error, debug=debug)
    return code
