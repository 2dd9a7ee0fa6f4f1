"""Who is writing to a folder: an advisory lock that the system drops when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from doge_deploy.errors import UsageError


class BusyError(Exception):
    """Another process has the lock."""


@contextlib.contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of `folder` in the block.

    Raises:
        UsageError: another process has it; the message is `busy`.
        OSError: the folder cannot be opened.
    """
    try:
        handle = take(folder)
    except BusyError:
        raise UsageError(busy) from None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def take(folder: Path) -> int | None:
    """Take the lock of a folder at once; the descriptor that holds it until it is closed.

    None where there are no such locks: on Windows and on some network filesystems nothing is kept apart.

    Raises:
        BusyError: another process has it.
        OSError: the folder cannot be opened.
    """
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise BusyError from None
        except OSError:
            os.close(handle)
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        os.close(handle)  # another process put a new folder in its place meanwhile
