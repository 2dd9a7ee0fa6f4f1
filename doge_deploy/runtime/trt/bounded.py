"""A Runner on an engine whose cache holds the window instead of the text.

Two networks share the cache. The one that decodes writes it in place, as in `runner.py`. The one for more tokens reads
it and gives another, which is copied back on the device: so what is bound never changes, and a recorded decode step
stays valid. A call of more tokens than that network takes is cut into pieces.

Axes: B rows, Q tokens of a call, Hkv key heads, w slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doge_deploy.bundle.signature import BATCH, RANK, SEQUENCE
from doge_deploy.errors import UsageError
from doge_deploy.runtime.base import FloatArray, IntArray
from doge_deploy.runtime.logits import Logits
from doge_deploy.runtime.trt.device import Memory
from doge_deploy.runtime.trt.plan import BindingPlan, nbytes
from doge_deploy.runtime.trt.runner import Context, Engine, TrtRunner, _Call


class BoundedTrtRunner(TrtRunner):
    """An engine of w slots.

    A row whose text fits into them holds its tokens in order, and may be cut; beyond, tokens lie in any order, and
    those that were pushed out are gone.

    Args:
        window: w.
        prefill: the network for calls of more than one token and its plan; None where the engine only decodes.
    """

    def __init__(
        self, *arguments: Any, window: int, prefill: tuple[Engine, BindingPlan] | None, **keywords: Any
    ) -> None:
        self._prefill = prefill
        super().__init__(*arguments, **keywords)
        self.window = window
        self._made: dict[str, Memory] = {}
        """Caches that the prefill gives, of as many rows as a call of it has, under the names of present."""

    @property
    def _most_rows(self) -> int:
        assert self._prefill is not None
        return max(profile.axes[BATCH].max for profile in self._prefill[1].record.profiles)

    @property
    def _piece(self) -> int:
        """Tokens that are computed at once."""
        assert self._prefill is not None
        return max(profile.axes[SEQUENCE].max for profile in self._prefill[1].record.profiles)

    def _make_long_context(self) -> Context:
        return (self._engine if self._prefill is None else self._prefill[0]).create_context()

    def refusal(self, batch_size: int, width: int) -> str | None:
        if width == 1 or self._prefill is None:
            return self.plan.refusal(batch_size, width)
        return self._prefill[1].refusal(batch_size, width if self.whole_calls else min(width, self._piece))

    def has_dropped(self, row: int) -> bool:
        return bool(self.row_lengths[row] > self.window)

    def _reset(self, batch_size: int) -> None:
        is_other = batch_size != self._batch
        super()._reset(batch_size)
        if is_other and self._prefill is not None:
            self._made = {}
            rows = min(batch_size, self._most_rows)
            for cache in self._prefill[1].caches:
                self._made[cache.present] = self.device.allocate(nbytes(cache.tensor, cache.shape(rows)))

    def _run_rows(self, first: int, input_ids: IntArray, lengths: IntArray) -> Logits:
        rows, width = input_ids.shape
        reason = self.refusal(rows, width)
        if reason is not None:
            raise UsageError(reason)
        if self._prefill is None or self.whole_calls or width <= self._piece:
            return self._run_piece(first, input_ids, lengths)
        return self._run_in_pieces(
            first, input_ids, lengths, self._piece, lambda *part: self._run_piece(*part).numpy().copy()
        )

    def _run_piece(self, first: int, input_ids: IntArray, lengths: IntArray) -> Logits:
        """A call, or a piece of one, in which rows that ended before have no real token."""
        rows, width = input_ids.shape
        if width == 1 and (lengths == 1).all():
            return super()._run_rows(first, input_ids, lengths)
        assert self._prefill is not None
        if self._call is None or self._call.key != (first, rows, width):
            self._call = None  # its memory is free for the next one
            self._call = self._make_prefill_call(first, rows, width)
        logits = self._feed(self._call, input_ids, lengths)
        for cache in self._prefill[1].caches:
            size = self._row_bytes(cache)
            self.device.copy(self._made[cache.present], 0, self._caches[cache.present], first * size, rows * size)
        return logits

    def _make_prefill_call(self, first: int, rows: int, width: int) -> _Call:
        assert self._prefill is not None
        plan, own = self._prefill[1], self.row_addresses(first)
        caches = {cache.past: own[cache.past] for cache in plan.caches}
        caches |= {cache.present: self._made[cache.present].address for cache in plan.caches}
        return _Call(self.device, plan, self._context, caches, first, rows, width)

    def _copy_row(self, source: int, target: int, tokens: int) -> None:
        super()._copy_row(source, target, self.window if self.has_dropped(source) else tokens)

    def cache(self) -> dict[str, list[FloatArray]]:
        held: dict[str, list[FloatArray]] = {}
        orders = self._orders()
        for cache in self.plan.caches:
            stem, _, kind = cache.present.rpartition(".")
            rows = self._read(cache)
            if kind == RANK:
                kind, rows = "score", rows[..., :1]
            order = orders[int(stem.split(".")[1])]
            held[f"{stem}.{kind}"] = [
                np.take_along_axis(row, slots[..., None], axis=1) for row, slots in zip(rows, order, strict=True)
            ]
        return held

    def held_positions(self) -> dict[int, list[IntArray]]:
        held: dict[int, list[IntArray]] = {}
        for layer, positions in self._positions().items():
            orders = self._orders_of(positions)
            held[layer] = [np.take_along_axis(row, slots, axis=1) for row, slots in zip(positions, orders, strict=True)]
        return held

    def _positions(self) -> dict[int, IntArray]:
        """Per layer the token in each slot, -1 where there is none, `[B, Hkv, w]`."""
        ranks = (cache for cache in self.plan.caches if cache.present.endswith(f".{RANK}"))
        return {int(cache.present.split(".")[1]): self._read(cache)[..., 1].astype(np.int64) - 1 for cache in ranks}

    def _orders(self) -> dict[int, list[IntArray]]:
        return {layer: self._orders_of(positions) for layer, positions in self._positions().items()}

    def _orders_of(self, positions: IntArray) -> list[IntArray]:
        """Per row the slots in use, the earliest token first, `[Hkv, n_b]`."""
        counts = np.minimum(self.row_lengths, self.window)
        order = np.argsort(positions, axis=2, kind="stable")
        return [row[:, self.window - count :] for row, count in zip(order, counts, strict=True)]
