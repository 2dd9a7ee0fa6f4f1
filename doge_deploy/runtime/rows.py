"""Rows of a static cache that can be called, copied, exchanged and cut one by one.

This is what a backend implements; `Runner` (all rows in each call) and `SlotRunner` (any rows, by stable names) are
both served by it.

Axes: B rows of the cache, R rows of a call, Q tokens of a call, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from doge_deploy.bundle.manifest import Manifest
from doge_deploy.runtime.base import BundleRunner, FloatArray, IntArray
from doge_deploy.runtime.logits import HostLogits, Logits
from doge_deploy.runtime.pieces import joined_logits, joined_selections


@dataclass(frozen=True)
class ChangingAngles:
    """The angles of a bundle that holds more tokens than its RoPE was made for: there they depend on where a call ends.

    Reference: `dynamic_rope_update` and `longrope_frequency_update` in transformers' modeling_rope_utils.py.
    """

    original: int
    """Tokens up to which they are always the same."""
    by_length: bool
    """Each longest text beyond has its own angles (dynamic); else all such texts have the same (longrope)."""

    @classmethod
    def in_bundle(cls, manifest: Manifest) -> ChangingAngles | None:
        """Of a bundle; None where they never change."""
        facts, length = manifest.facts, manifest.max_length
        if not facts.rope_changes(length):
            return None
        assert facts.stateless_length is not None
        return cls(facts.stateless_length, facts.rope_remembers(length))

    def of(self, ends: IntArray) -> IntArray:
        """Numbers of the angles of calls that end behind the `ends` `[R]` first tokens of their texts, `[R]`."""
        if self.by_length:
            return np.maximum(ends, self.original)
        return (ends > self.original).astype(np.int64)


class RowsRunner(BundleRunner):
    """A runner whose B rows lie one after the other in the same buffers.

    A call takes R neighbouring rows, in place: it costs what those rows cost, and changes no other row. What a row
    holds is finite everywhere, also beyond its tokens: a hidden key's 0 weight multiplies its value, and 0 times
    infinity is not 0.
    """

    whole_calls: bool = False
    """Whether what a token gets depends on the call that it comes in: then a prompt in pieces is another prompt."""

    many_logits: bool = False
    """Whether `run_rows` gives the logits of several tokens of each row where that is asked for."""

    angles: ChangingAngles | None = None
    """Where the longest row of a call decides the angles of all its rows; None where no row does."""

    vocab_size: int

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        return self._run_rows(0, input_ids, lengths).numpy()

    def run_rows(self, first: int, input_ids: IntArray, lengths: IntArray, last: int = 1) -> Logits:
        """Feed the next tokens of the rows `first` to `first + R - 1`, each of which gets what it gets alone.

        Args:
            first: the first row of the call.
            input_ids: `[R, Q]`, padded on the right with any valid id.
            lengths: `[R]`, how many of them are real, 1..Q. Every row must have space for all Q.
            last: how many of the last real tokens of each row have logits, where the model does not give all; more than
                1 with `many_logits` only, and at most as many as every row has.
        """
        parts = self._alike(first, lengths)
        if len(parts) == 1:
            return self._run_alike(first, input_ids, lengths, last)
        # One call of the graph for each part: its rows have one memory of RoPE.
        tokens = last if self.last_logits else input_ids.shape[1]
        found: FloatArray | None = None
        for part in parts:
            width = int(lengths[part.start])
            logits = self._run_alike(first + part.start, input_ids[part, :width], lengths[part], last).numpy()
            if found is None:
                found = np.zeros((len(lengths), tokens, logits.shape[2]), logits.dtype)
            found[part, : logits.shape[1]] = logits
        assert found is not None
        return HostLogits(found)

    def _alike(self, first: int, lengths: IntArray) -> list[slice]:
        """The rows of a call in parts whose rows have the same angles together as alone. Where there are several, all
        rows of a part have as many tokens, since padding counts as text.
        """
        whole = [row_range(0, len(lengths))]
        if self.angles is None or len(lengths) == 1:
            return whole
        held = self.row_lengths[row_range(first, len(lengths))]
        if (held + lengths.max() <= self.angles.original).all():
            return whole
        kinds = np.stack((self.angles.of(held + lengths), lengths))
        changes = 1 + np.flatnonzero((kinds[:, 1:] != kinds[:, :-1]).any(axis=0))
        return [slice(start, end) for start, end in pairwise([0, *changes.tolist(), len(lengths)])]

    def _run_alike(self, first: int, input_ids: IntArray, lengths: IntArray, last: int) -> Logits:
        if self.angles is not None:
            # The longest text that a row has seen is its own, which this call makes longer: nothing to be remembered.
            self._forget_rope()
        logits = self._run_rows(first, input_ids, lengths) if last == 1 else self._run_last(first, input_ids, last)
        self._advance(first, lengths)
        return logits

    def _advance(self, first: int, lengths: IntArray) -> None:
        held = self.row_lengths.copy()
        held[first : first + len(lengths)] += lengths
        self.row_lengths = held

    def _run_in_pieces(
        self,
        first: int,
        input_ids: IntArray,
        lengths: IntArray,
        step: int,
        run: Callable[[int, IntArray, IntArray], FloatArray],
        *,
        every: bool = False,
    ) -> Logits:
        """A call in pieces of at most `step` tokens, with the logits and what else one call would give.

        Args:
            first: the first row of the call.
            input_ids: `[R, Q]`, as in `run_rows`.
            lengths: `[R]`, as in `run_rows`.
            step: tokens of a piece.
            run: runs a piece, in which a row that ended before has no real token; nobody else writes to its logits.
            every: it gives the logits of every token, whatever the model gives where nobody asks.
        """
        parts, kept, before = [], [], self.row_lengths
        try:
            for start in range(0, input_ids.shape[1], step):
                part = input_ids[:, start : start + step]
                real = np.clip(lengths - start, 0, part.shape[1])
                parts.append(run(first, part, real))
                kept.append(self.extra)
                self._advance(first, real)
        finally:
            self.row_lengths = before  # the caller advances it
        self.extra = {name: joined_selections([part[name] for part in kept], len(lengths)) for name in kept[0]}
        return HostLogits(joined_logits(parts, lengths, step, last=self.last_logits and not every))

    def take_memory(self) -> None:
        """Have the system give the memory of all rows now, where it would do so when each is used for the first time:
        a step that has to wait for that takes several times as long.
        """

    def joins(self, lengths: Sequence[int]) -> bool:
        """Whether rows with so many tokens each are computed in one call as each is alone, except for the rounding of
        another number of rows.
        """
        return self.angles is None

    def clear_row(self, row: int) -> None:
        """The row holds nothing, and zeros where it held something."""
        self._clear_row(row, 0)
        self._set_length(row, 0)

    def truncate_row(self, row: int, tokens: int) -> None:
        """The row holds its first `tokens` only; it must not have lost any (`has_dropped`)."""
        self._clear_row(row, tokens)
        self._set_length(row, tokens)

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        """`target` holds the first `tokens` of `source`, or all that it has where `source` has dropped some."""
        self._clear_row(target, 0)
        self._copy_row(source, target, tokens)
        self._set_length(target, tokens)

    def swap_rows(self, a: int, b: int) -> None:
        """Exchange what two different rows hold."""
        self._swap_rows(a, b)
        held = self.row_lengths.copy()
        held[[a, b]] = held[[b, a]]
        self.row_lengths = held

    def has_dropped(self, row: int) -> bool:
        """Whether the row no longer has the keys of all its tokens."""
        return False

    def _set_length(self, row: int, tokens: int) -> None:
        held = self.row_lengths.copy()
        held[row] = tokens
        self.row_lengths = held

    @abstractmethod
    def _run_rows(self, first: int, input_ids: IntArray, lengths: IntArray) -> Logits:
        """Compute one call and keep the new caches; `row_lengths` is still the one before the call."""

    def _run_last(self, first: int, input_ids: IntArray, last: int) -> Logits:
        """The same for rows without padding, with the logits `[R, last, V]`; for those that have `many_logits`."""
        raise NotImplementedError

    def _forget_rope(self) -> None:
        """RoPE has seen no text yet, for a backend that feeds what it remembers."""

    @abstractmethod
    def _clear_row(self, row: int, kept: int) -> None:
        """Zeros from slot `kept` on."""

    @abstractmethod
    def _copy_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens`, or everything there is where some were dropped, into an empty row."""

    @abstractmethod
    def _swap_rows(self, a: int, b: int) -> None:
        """Exchange two rows of every buffer."""


def row_range(first: int, rows: int) -> slice:
    """The rows of a call."""
    return slice(first, first + rows)


def padded(ids: list[IntArray]) -> tuple[IntArray, IntArray]:
    """Tokens of several rows as `[R, Q]`, padded on the right with the row's last one, and their numbers `[R]`."""
    lengths = np.array([len(row) for row in ids], np.int64)
    width = int(lengths.max())
    return np.stack([np.pad(row, (0, width - len(row)), mode="edge") for row in ids]), lengths
