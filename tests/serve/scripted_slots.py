"""Rows without a model: the next token is a function of what a row holds, so a wrong row shows at once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.logits import HostLogits

VOCAB = 97


def next_token(history: Sequence[int]) -> int:
    """The likeliest token after `history`: it depends on all of it."""
    return 2 + zlib.crc32(np.asarray(history, np.int64).tobytes()) % (VOCAB - 2)


def repeating(history: Sequence[int]) -> int:
    """A text that repeats itself every five tokens."""
    return history[-5] if len(history) >= 5 else 2 + len(history)


class ScriptedSlots:
    """As strict as a runner: every slot is checked, and nothing is held but what was fed.

    Args:
        cuts: whether a slot can be cut; where not, it can only be emptied.
        joins: most slots that `extend` takes at once.
    """

    whole_prompts = False
    peak = 9.0
    """Of the likeliest token's logit; the others are 0."""

    def __init__(
        self,
        slots: int,
        *,
        max_length: int = 64,
        rule: Callable[[list[int]], int] = next_token,
        all_logits: bool = True,
        cuts: bool = True,
        joins: int = 99,
        vocab: int = VOCAB,
    ) -> None:
        self.slots, self.max_length, self.all_logits, self.cuts = slots, max_length, all_logits, cuts
        self.rows: dict[int, list[int]] = {}
        self.rule, self.vocab = rule, vocab
        self.most = joins
        self.calls: list[tuple[str, Any]] = []
        """Kind of each call and its number of tokens, or those of each slot where there are several."""
        self.wrong: list[str] = []
        """What nobody may ask for; a scheduler that feeds rows alone after an error would hide it."""
        self.nan_after: set[tuple[int, ...]] = set()
        """Histories after which the logits are NaN."""

    def acquire(self) -> int:
        slot = len(self.rows)
        assert slot < self.slots
        self.rows[slot] = []
        return slot

    def _logits(self, history: list[int]) -> FloatArray:
        logits = np.full(self.vocab, 0.0, np.float32)
        logits[self.rule(history)] = self.peak
        if tuple(history) in self.nan_after:
            logits[:] = np.nan
        return logits

    def _feed(self, slot: int, ids: Sequence[int]) -> FloatArray:
        assert len(ids) > 0 and len(self.rows[slot]) + len(ids) <= self.max_length
        result = []
        for token in ids:
            self.rows[slot].append(token)
            result.append(self._logits(self.rows[slot]))
        return np.stack(result if self.all_logits else result[-1:])

    def prefill(self, slot: int, ids: Sequence[int]) -> HostLogits:
        self.calls.append(("prefill", len(ids)))
        return HostLogits(self._feed(slot, ids)[None])

    def joins(self, lengths: Sequence[int]) -> bool:
        return len(lengths) <= self.most and not self.whole_prompts

    def extend(self, slots: Sequence[int], ids: Sequence[Sequence[int]], last: int = 1) -> HostLogits:
        lengths = [len(each) for each in ids]
        if len(slots) == 1:
            assert last == lengths[0], "whoever extends a slot wants all logits"
            self.calls.append(("extend", last))
            return HostLogits(self._feed(slots[0], ids[0])[None])
        if not (last == 1 and len(set(slots)) == len(slots) == len(ids) and self.joins(lengths)):
            self.wrong.append(f"slots {slots} cannot be fed together with {lengths} tokens, last={last}")
        if any(len(self.rows[slot]) + max(lengths) > self.max_length for slot in slots):
            self.wrong.append(f"no space for padding in {slots} with {lengths} tokens")
        assert not self.wrong, self.wrong
        self.calls.append(("together", tuple(lengths)))
        rows = [self._feed(slot, tokens) for slot, tokens in zip(slots, ids, strict=True)]
        logits = np.full((len(rows), max(map(len, rows)), self.vocab), np.nan, np.float32)  # what padding gives
        for row, own in zip(logits, rows, strict=True):
            row[: len(own)] = own
        return HostLogits(logits)

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> HostLogits:
        assert len(slots) == len(ids) == len(set(slots)) > 0
        self.calls.append(("decode", len(ids)))
        return HostLogits(np.stack([self._feed(slot, [token]) for slot, token in zip(slots, ids, strict=True)]))

    def copy(self, source: int, target: int, tokens: int) -> None:
        assert source != target and 1 <= tokens <= len(self.rows[source])
        assert self.cuts or tokens == len(self.rows[source])
        self.rows[target] = self.rows[source][:tokens]

    def truncate(self, slot: int, tokens: int) -> None:
        assert tokens <= len(self.rows[slot])
        assert self.cuts or tokens in (0, len(self.rows[slot]))
        del self.rows[slot][tokens:]

    def can_cut(self, slot: int) -> bool:
        return self.cuts
