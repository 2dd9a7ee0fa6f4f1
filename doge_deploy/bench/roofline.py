"""Memory bandwidth: a streaming read by as many threads as the run.

Each thread reads its own slice of one large array with BLAS's dot product (of the slice with itself: one stream of
loads, in vector registers, without Python's lock). The array is far larger than the last-level cache, the rule of
STREAM. Reads only, because decoding reads: weights are not written back.
Reference: J. D. McCalpin, STREAM, https://www.cs.virginia.edu/stream/ref.html ("each array must be at least 4 times the
size of the sum of all the last-level caches").
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter_ns

import numpy as np

from doge_deploy.bench.measure import garbage_collection_off

SWEEPS = 16
"""Reads of the whole array per round, each timed; an untimed one goes before them."""

_SMALLEST_BYTES = 256 << 20
_CACHES = 8
"""The array is at least so many times the last-level cache."""


def buffer_bytes(last_level_cache_bytes: int | None) -> int:
    """Size of the array that is read."""
    return max(_SMALLEST_BYTES, _CACHES * (last_level_cache_bytes or 0))


class BandwidthProbe:
    """The array and its readers. NumPy's BLAS must be limited to one thread by the environment."""

    def __init__(self, threads: int, nbytes: int) -> None:
        self.nbytes = nbytes // 4 * 4
        self._slices = np.array_split(np.ones(self.nbytes // 4, np.float32), threads)
        self._pool = ThreadPoolExecutor(threads)

    def time_sweeps(self) -> list[int]:
        """Nanoseconds that each of `SWEEPS` reads of the whole array took."""
        with garbage_collection_off():
            return [self._sweep() for _ in range(SWEEPS + 1)][1:]

    def _sweep(self) -> int:
        start = perf_counter_ns()
        for _ in self._pool.map(lambda part: float(np.dot(part, part)), self._slices):
            pass
        return perf_counter_ns() - start
