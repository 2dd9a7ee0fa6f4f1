"""Which numbers of a large tensor a recording holds.

The caches of 4096 tokens have a million numbers a layer. So of a tensor beyond a budget every vector (a key, a value,
the logits of a position) is held, but only one in `step` of its numbers: others in each vector, so that all vectors and
all channels are seen, and no fault that repeats in tiles can hide between the places. These follow from the indices
alone, by integer arithmetic that no library's version changes.

Axes: H heads, n vectors, D numbers of a vector, c of them that are held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from doge_deploy.verify.compare import Array

CACHE_NUMBERS = 2**15
"""Of one cache tensor in one case: 256 keys of 128 numbers are held whole, 2048 keys with 16 numbers each."""

LOGIT_NUMBERS = 2**19
"""Of all logits of one case: 16 positions of a vocabulary of 32768 are held whole."""


def step_for(shapes: Sequence[tuple[int, ...]], budget: int) -> int:
    """One number in how many is held, at most as many as the budget has; vectors along the last axis, one at least."""
    total = sum(int(np.prod(shape)) for shape in shapes)
    return max(1, min(-(-total // budget), shapes[0][-1]))


def places(columns: Array, size: int, step: int) -> Array:
    """Indices `[H, n, c]` of the numbers that are held of each vector, no two the same.

    Args:
        columns: `[H, n]`: which vector of its head each is.
        size: D.
        step: one number in so many.
    """
    heads = np.arange(len(columns), dtype=np.uint64)[:, None] << np.uint64(40)
    start = _mix(columns.astype(np.uint64) + heads) % np.uint64(size)
    offsets = np.arange(size // step, dtype=np.uint64) * np.uint64(step)
    result: Array = ((start[:, :, None] + offsets) % np.uint64(size)).astype(np.int64)
    return result


def held(row: Array, step: int, columns: Array) -> Array:
    """The numbers `[H, n, c]` of `row` `[H, n, D]` at `places`; all of them where the step is 1."""
    return row if step == 1 else np.take_along_axis(row, places(columns, row.shape[-1], step), axis=2)


def columns_of(row: Array, first: int = 0) -> Array:
    """`[H, n]` of a row that holds all of its vectors, the first of which is number `first`."""
    return np.broadcast_to(np.arange(first, first + row.shape[1]), row.shape[:2])


def _mix(numbers: Array) -> Array:
    """A hash of 64 bits: the finalizer of SplitMix64 (Steele, Lea, Flood 2014, figure 14)."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result: Array = z ^ (z >> np.uint64(31))
    return result
