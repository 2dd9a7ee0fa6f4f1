"""The interface of everything that can run a Doge.

Axes: B batch, Q tokens of this call, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from doge_deploy.bundle.signature import Signature
from doge_deploy.errors import UsageError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.floating]


class Runner(ABC):
    """A model with its KV cache.

    `reset` starts B empty rows; each `run` feeds the next Q tokens of every row and returns logits. A prefill is a
    `run` on empty rows, a chunk of a prefill or a decode step one on rows that hold something.

    Rows may be of different length: shorter ones are padded on the right to Q tokens, `lengths[b]` of which are real.
    What follows the real tokens is forgotten: the next call continues after the last real one.
    """

    def __init__(self, *, max_length: int, last_logits: bool) -> None:
        self.max_length = max_length
        self.last_logits = last_logits
        self.row_lengths: IntArray = np.zeros(0, np.int64)
        """Real tokens that each row holds, `[B]`."""

    def reset(self, batch_size: int = 1) -> None:
        """Forget everything and start `batch_size` empty rows."""
        self.row_lengths = np.zeros(batch_size, np.int64)
        self._reset(batch_size)

    def run(self, input_ids: IntArray, lengths: Sequence[int] | None = None) -> FloatArray:
        """Feed `input_ids` `[B, Q]`.

        Args:
            input_ids: the next tokens, right-padded with any valid id.
            lengths: how many of them are real in each row, 1..Q; all where None.

        Returns:
            logits `[B, Q, V]`, or `[B, 1, V]` of each row's last real token where the model gives only those.

        Raises:
            UsageError: the tokens do not fit into `max_length`, or the shapes contradict each other.
        """
        batch, width = input_ids.shape
        real = np.full(batch, width) if lengths is None else np.asarray(lengths, np.int64)
        legal = lengths is None or (real.shape == (batch,) and real.min() >= 1 and real.max() <= width)
        if batch != len(self.row_lengths) or width < 1 or not legal:
            raise UsageError(
                f"run: input_ids {input_ids.shape} with lengths {real.tolist()} on {len(self.row_lengths)} rows"
            )
        longest = int(self.row_lengths.max()) + width
        if longest > self.max_length:
            raise UsageError(f"{longest} tokens do not fit: the bundle's max_length is {self.max_length}")
        logits = self._run(input_ids.astype(np.int64, copy=False), real)
        self.row_lengths = self.row_lengths + real
        return logits

    def refusal(self, batch_size: int, width: int) -> str | None:
        """Why a call of `batch_size` rows and `width` tokens cannot be run, whatever the rows hold; None: it can."""
        return None

    @abstractmethod
    def _reset(self, batch_size: int) -> None:
        """Make empty caches for `batch_size` rows."""

    @abstractmethod
    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        """Compute one call and keep the new caches; `row_lengths` is still the one before the call."""

    @abstractmethod
    def cache(self) -> dict[str, list[FloatArray]]:
        """What the rows hold: for every present tensor one `[Hkv, n_b, D]` array per row, its n_b real slots in
        order; a sliding cache no longer holds the first ones.
        """


class BundleRunner(Runner):
    """A runner of one layout of a bundle."""

    signature: Signature
    """Of the layout."""
    extra: Mapping[str, np.ndarray[Any, Any]]
    """Values that the last call gave beyond the signature: selections, where they are exposed."""

    def real_columns(self) -> npt.NDArray[np.bool_] | None:
        """Which columns of all calls so far hold real tokens, `[B, columns]`, where padding stays in the cache; None
        where a row's tokens are its first columns.
        """
        return None

    def held_positions(self) -> dict[int, list[IntArray]]:
        """Per layer and row the token that each slot of `cache()` holds, `[Hkv, n_b]`; empty where a row holds all of
        its tokens in order.
        """
        return {}
