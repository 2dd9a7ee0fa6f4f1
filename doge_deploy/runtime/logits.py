"""The logits of one call, where the backend has them until they are asked for.

Axes: R rows of the call, Q tokens with logits (those of the call, or 1), V vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import numpy as np

from doge_deploy.runtime.base import FloatArray, IntArray

NO_TOKEN = -1
"""What `Logits.argmax` gives where there is no finite largest number."""


class Logits(ABC):
    """Logits `[R, Q, V]` of one call. A backend overwrites them in its next call: read them before it."""

    _order: IntArray | None = None
    """Rows of the call in the order in which they are given out; as they were computed where None."""

    @abstractmethod
    def _read(self) -> tuple[FloatArray, bool]:
        """All rows in the processor's memory as they were computed, and whether nobody else writes there.

        Raises:
            RuntimeError: a later call has overwritten them.
        """

    def numpy(self) -> FloatArray:
        """All of them, `[R, Q, V]`; the array stays as it is whatever the backend does next.

        Raises:
            RuntimeError: a later call has overwritten them.
        """
        array, own = self._read()
        if self._order is not None:
            return array[self._order]
        return array if own else array.copy()

    def argmax(self) -> IntArray:
        """The likeliest token of each place, `[R, Q]`; the lowest of equals, `NO_TOKEN` where there is a NaN or the
        largest number is infinite.

        A device that can choose overrides this, and copies R * Q numbers instead of all logits.
        """
        tokens = best_tokens(self._read()[0])
        return tokens if self._order is None else tokens[self._order]

    def rows(self, order: IntArray) -> Self:
        """The rows `order` `[R']` of these logits, which need not be all."""
        chosen = copy.copy(self)
        chosen._order = order if self._order is None else self._order[order]
        return chosen


class HostLogits(Logits):
    """Logits in the processor's memory.

    Args:
        array: `[R, Q, V]`.
        is_current: whether `array` still holds them; where None, nobody else writes to it.
    """

    def __init__(self, array: FloatArray, is_current: Callable[[], bool] | None = None) -> None:
        self._array, self._is_current = array, is_current

    def _read(self) -> tuple[FloatArray, bool]:
        check_current(self._is_current is None or self._is_current())
        return self._array, self._is_current is None


def check_current(current: bool) -> None:
    """Raises RuntimeError where logits were overwritten."""
    if not current:
        raise RuntimeError("these logits were overwritten by a later call: read them before it")


def best_tokens(logits: FloatArray) -> IntArray:
    """`Logits.argmax` of `[..., V]`."""
    tokens: IntArray = logits.argmax(axis=-1)  # NumPy takes a NaN for the largest
    best = np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return np.where(np.isfinite(best), tokens, NO_TOKEN)
