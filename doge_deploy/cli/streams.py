"""Standard input, output and error: closed ones, and those whose reader went away."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def open_closed_streams() -> None:
    """Put /dev/null in the place of what the caller closed (`>&-`).

    Otherwise the next file that is opened gets its number, and whatever a library prints lands in that file.
    A character that an output cannot show becomes a question mark there, not an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            else:
                os.set_inheritable(null, True)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def flush() -> None:
    """Write what is still held back. Raises OSError where that fails, while it can still be said."""
    sys.stdout.flush()
    sys.stderr.flush()


def discard_output() -> None:
    """Send what is still held back nowhere: Python flushes once more when it ends, which must not fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
