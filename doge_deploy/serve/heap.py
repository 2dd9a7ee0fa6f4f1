"""Freed memory that the C library has kept goes back to the system while nothing is asked of the server."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return what the heap does not use, where the C library can (glibc); elsewhere nothing happens.

    Large arrays of other lengths with every request leave holes between smaller ones that live on. glibc keeps these
    holes, so that a server which has seen many requests holds more than one that has seen few.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no process-wide handle
        return None
    return trim
