"""Memory of the C library (glibc): one heap for all threads, and what it does not use goes back while nobody asks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

_M_ARENA_MAX = -8
"""Of malloc.h: how many heaps there may be."""


def share_one_heap() -> None:
    """Let threads that begin from now on use the heap of the first one, where the C library can be told so.

    glibc gives each thread a heap of its own. The free end of such a heap stays with the process, whatever `give_back`
    does, so that every thread holds what its largest moment took.
    """
    if (option := _function("mallopt")) is not None:
        option(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return what the heap does not use, where the C library can; elsewhere nothing happens.

    Large arrays of other lengths with every request leave holes between smaller ones that live on. glibc keeps these
    holes, so that a server which has seen many requests holds more than one that has seen few.
    """
    if (trim := _function("malloc_trim")) is not None:
        trim(0)


@cache
def _function(name: str) -> Callable[..., int] | None:
    """One of glibc's functions; None with another C library."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # Windows has no handle of the whole process
        return None
    return found
