"""A static cache that holds the window instead of the text.

A row's w-th best score never falls as the row grows, so a key that once is not among the best w of its head never comes
back: it can be dropped, and decoding stays exact whatever the length of the text. Slots are appended to; when there are
too many, those in the window are moved together, in order, so that ties still go to the earliest token.

Axes: B rows, Hkv key heads, S slots, Q tokens of a call, D size of a head, w keep_window_size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doge_deploy.bundle.signature import SLOTS, past_name, present_name
from doge_deploy.runtime.base import FloatArray, IntArray
from doge_deploy.runtime.ort.runners import StaticOrtRunner
from doge_deploy.runtime.rows import row_range

CHUNK = 256
"""Tokens of a prefill that are computed at once: [Hkv, Q, K] numbers per layer are compared for the selection."""

SPARE = 64
"""Slots beyond the window that decoding may fill before they are dropped: to move keys costs time, and every slot is
read in every step.
"""


class WindowOrtRunner(StaticOrtRunner):
    """Runs a graph of `signature.windowed`, with at most w + `CHUNK` slots unless a call must stay whole.

    Args:
        window: w.
    """

    def __init__(self, *arguments: Any, window: int, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.window = window
        for name, shape in self._shapes.items():
            if name.startswith(("past_key_values.", "present.")):
                self._shapes[name] = (*shape[:2], SLOTS, *shape[3:])
        self._shapes["slot_indices"] = self._shapes["write_indices"]
        self._layers = len({name.split(".")[1] for _, name in self.past})
        self._held: IntArray = np.zeros(0, np.int64)
        self._positions: list[IntArray] = []
        """Per layer `[B, Hkv, S]`: the token in each slot."""

    @property
    def _piece(self) -> int:
        return CHUNK

    def held(self) -> IntArray:
        return self._held

    def positions(self, layer: int) -> list[IntArray]:
        """Per row the position of the token in each slot in use, `[Hkv, n_b]`."""
        return [self._positions[layer][b, :, :n] for b, n in enumerate(self._held)]

    def held_positions(self) -> dict[int, list[IntArray]]:
        return {layer: self.positions(layer) for layer in range(self._layers)}

    def _zeros(self, name: str, **sizes: int) -> Any:
        return super()._zeros(name, **{SLOTS: min(self.window + CHUNK, self.max_length), **sizes})

    def _reset(self, batch_size: int) -> None:
        if self._batch != batch_size:
            self._held, self._positions = np.zeros(batch_size, np.int64), []
        super()._reset(batch_size)
        if not self._positions:
            shape = self._array(0, "key").shape[:3]
            self._positions = [np.zeros(shape, np.int64) for _ in range(self._layers)]

    def has_dropped(self, row: int) -> bool:
        return bool(self._held[row] < self.row_lengths[row])

    def _run_part(self, first: int, input_ids: IntArray, lengths: IntArray, last: int = 1) -> FloatArray:
        count, width = input_ids.shape
        rows = row_range(first, count)
        needed = int(self._held[rows].max()) + width
        if needed > min(self._slots, self.window + max(SPARE, width)):
            self._drop(rows)
            needed = int(self._held[rows].max()) + width
        if needed > self._slots:
            self._grow(needed)
        for b in range(first, first + count):
            tokens, slot = self.row_lengths[b] + np.arange(width), self._held[b]
            for positions in self._positions:
                positions[b, :, slot : slot + width] = tokens
        logits = super()._run_part(first, input_ids, lengths, last)
        self._held[rows] += lengths
        self.extra = {name: self._by_position(name, value, rows) for name, value in self.extra.items()}
        return logits

    def _clear_row(self, row: int, kept: int) -> None:
        super()._clear_row(row, kept)
        self._held[row] = min(kept, self._held[row])
        for positions in self._positions:
            positions[row, :, kept:] = 0

    def _copy_row(self, source: int, target: int, tokens: int) -> None:
        super()._copy_row(source, target, tokens)
        self._held[target] = min(tokens, self._held[source])
        for positions in self._positions:
            positions[target] = positions[source]

    def _swap_rows(self, a: int, b: int) -> None:
        super()._swap_rows(a, b)
        for array in (self._held, *self._positions):
            array[[a, b]] = array[[b, a]]

    @property
    def _slots(self) -> int:
        return int(self._positions[0].shape[2])

    def _array(self, layer: int, kind: str) -> Any:
        return self._buffers[present_name(past_name(layer, kind))]

    def _drop(self, rows: slice) -> None:
        """Move the slots of each row's window together; those of a row that is not beyond it stay where they are."""
        beyond = rows.start + np.flatnonzero(self._held[rows] > self.window)
        for layer, positions in enumerate(self._positions):
            score = self._array(layer, "score")
            arrays = [self._array(layer, "key"), self._array(layer, "value"), score, positions[..., None]]
            for b in beyond:
                order = np.argsort(-score[b, :, : self._held[b], 0], axis=1, kind="stable")
                best = np.sort(order[:, : self.window], axis=1)
                for array in arrays:
                    array[b, :, : self.window] = np.take_along_axis(array[b], best[..., None], axis=1)
        self._held[beyond] = self.window

    def _grow(self, slots: int) -> None:
        """More slots, for a call that must stay whole."""
        more = slots - self._slots

        def grown(array: Any) -> Any:
            return np.concatenate((array, np.zeros((*array.shape[:2], more, *array.shape[3:]), array.dtype)), axis=2)

        self._bind_buffers({name: grown(array) for name, array in self._buffers.items()})
        self._positions = [grown(positions) for positions in self._positions]

    def _by_position(self, name: str, value: Any, rows: slice) -> Any:
        """A selection of keys `[B, Hkv, Q, slots in use]` -> `[B, Hkv, Q, positions]`; others as they are."""
        if not name.startswith("kept."):
            return value
        positions = self._positions[int(name.split(".")[1])][rows]
        result = np.zeros((*value.shape[:3], int(positions.max()) + 1), bool)
        columns = positions[:, :, None, : value.shape[3]]
        # A slot beyond a row's own has an old position; nothing there is kept.
        batch, head, row, slot = np.nonzero(value)
        result[batch, head, row, columns[batch, head, 0, slot]] = True
        return result
