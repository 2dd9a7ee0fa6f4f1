"""What is replayed: sequences of calls, chosen for where a Doge can go wrong.

Axes: B rows, Q tokens of a call; w keep_window_size, L max_length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from doge_deploy.config.model import DogeFacts
from doge_deploy.runtime.base import IntArray

GREEDY = "greedy"
NATURAL = "natural text"

GREEDY_STEPS = 128
"""Tokens of the greedy case where nobody says how many."""

SEEDS = (0, 100, 200, 300)
"""Tried in turn until an exactness case has wide margins in the reference."""


@dataclass(frozen=True)
class Call:
    """One call of a model: `input_ids` `[B, Q]`, right-padded, `lengths` `[B]` of which are real."""

    input_ids: IntArray
    lengths: IntArray


@dataclass(frozen=True)
class Case:
    """Calls on fresh rows, in order."""

    name: str
    calls: tuple[Call, ...]
    exact: bool
    """The token ids do not repeat in a row, so selections must be the reference's own (if its margins are wide); other
    text is judged by certificate."""

    @property
    def longest(self) -> int:
        """Most tokens that a row holds in the end."""
        return int(np.sum([call.lengths for call in self.calls], axis=0).max())


@dataclass(frozen=True)
class Limits:
    """What bounds the cases of a bundle."""

    vocab_size: int
    max_length: int
    keep_window_size: int
    sliding_window: int | None = None
    original_length: int | None = None
    """Where RoPE begins to change, if the bundle reaches so far."""

    task: str = "causal-lm"
    pad_token_id: int | None = None

    @classmethod
    def of(cls, facts: DogeFacts, max_length: int, task: str = "causal-lm") -> Limits:
        """The limits of a bundle of `max_length` tokens a row."""
        original = facts.stateless_length if facts.rope_changes(max_length) else None
        return cls(
            facts.vocab_size,
            max_length,
            facts.keep_window_size,
            facts.sliding_window,
            original,
            task,
            facts.pad_token_id,
        )

    @property
    def batches(self) -> bool:
        """Whether a call may have several rows: a classification without a padding token may not."""
        return self.task != "sequence-classification" or self.pad_token_id is not None


def chunk(rows: Sequence[IntArray], sizes: Sequence[Sequence[int]]) -> tuple[Call, ...]:
    """Cut rows of ids into calls: `sizes[c][b]` tokens of row b go into call c."""
    calls, done = [], [0] * len(rows)
    for call_sizes in sizes:
        width = max(call_sizes)
        ids = np.zeros((len(rows), width), np.int64)
        for b, size in enumerate(call_sizes):
            ids[b, :size] = rows[b][done[b] : done[b] + size]
            done[b] += size
        calls.append(Call(ids, np.asarray(call_sizes, np.int64)))
    return tuple(calls)


def distinct_ids(limits: Limits, count: int, seed: int) -> IntArray:
    """`count` ids of which none repeats (as far as the vocabulary reaches)."""
    order = np.random.default_rng(seed).permutation(limits.vocab_size)
    if limits.task == "sequence-classification" and limits.vocab_size > 1:
        order = order[order != limits.pad_token_id]  # a text that ends in padding is classified by what is before it
    return np.resize(order, count).astype(np.int64)


def repeating_ids(limits: Limits, count: int, seed: int = 0) -> IntArray:
    """Ids with the repetitions of natural text (Zipf-like), for a checkpoint without a tokenizer."""
    generator = np.random.default_rng(seed)
    words = generator.permutation(limits.vocab_size)[: max(2, min(200, limits.vocab_size))]
    rank = np.minimum(generator.zipf(1.3, count), len(words)) - 1
    ids: IntArray = words[rank].astype(np.int64)
    return ids


def exact_cases(limits: Limits, seed: int) -> Iterator[Case]:
    """Prefill, decode from a past, chunked prefill, a batch, and the window boundary; ids that do not repeat.

    A task without a cache has those that are one call.
    """
    cases = _cached_cases(limits, seed)
    if limits.task == "causal-lm":
        yield from cases
        return
    yield from (case for case in cases if len(case.calls) == 1)
    if limits.batches and limits.max_length > 1:
        length = min(24, limits.max_length)
        rows = [distinct_ids(limits, length, seed + row) for row in (11, 12, 13)]
        yield Case("batch of 3", chunk(rows, [[length, length // 2 + 1, 1]]), exact=True)


def exact_case(limits: Limits, seed: int, name: str) -> Case:
    """The one of `exact_cases` that is called `name`.

    Raises:
        StopIteration: there is none.
    """
    return next(case for case in exact_cases(limits, seed) if case.name == name)


def _cached_cases(limits: Limits, seed: int) -> Iterator[Case]:
    length = min(48, limits.max_length)
    row = distinct_ids(limits, length, seed)
    one = [row]
    yield Case("prefill", chunk(one, [[length]]), exact=True)
    past = length // 3
    yield Case("decode", chunk(one, [[past]] + [[1]] * min(16, length - past)), exact=True)
    yield Case("chunked prefill", chunk(one, [[n] for n in _chunks(length)]), exact=True)
    yield from _batch_case(limits, seed)
    yield from _window_cases(limits, seed)
    yield from _sliding_cases(limits, seed)
    yield from _rope_cases(limits, seed)


def _chunks(length: int) -> list[int]:
    """Sizes that add up to `length`: some, one, a few, the rest."""
    sizes, left = [], length
    for size in (16, 1, 7):
        if left > size:
            sizes.append(size)
            left -= size
    return [*sizes, left]


def _batch_case(limits: Limits, seed: int) -> Iterator[Case]:
    """Two rows of different length: prefill, decode, another chunk, decode."""
    sizes = [[24, 13], [1, 1], [1, 1], [5, 3], [1, 1]]
    if limits.max_length >= 40:
        rows = [distinct_ids(limits, 32, seed + 1), distinct_ids(limits, 32, seed + 2)]
        yield Case("batch of 2", chunk(rows, sizes), exact=True)


def _window_cases(limits: Limits, seed: int) -> Iterator[Case]:
    """K = w-1, w, w+1, 2w in one prefill, and across the boundary in decode; only lengths the bundle can hold."""
    w, capacity = limits.keep_window_size, limits.max_length
    for label, length in (("w-1", w - 1), ("w", w), ("w+1", w + 1), ("2w", 2 * w)):
        if 0 < length <= capacity:
            row = distinct_ids(limits, length, seed + 3)
            yield Case(f"window K={label}", chunk([row], [[length]]), exact=True)
    steps = min(4, capacity - (w - 1))
    if w > 1 and steps > 0:
        row = distinct_ids(limits, w + 3, seed + 4)
        yield Case("window decode", chunk([row], [[w - 1]] + [[1]] * steps), exact=True)
    if w > 8 and w + 8 <= capacity:
        row = distinct_ids(limits, w + 8, seed + 5)
        yield Case("window chunk", chunk([row], [[w - 8], [16]]), exact=True)


def _sliding_cases(limits: Limits, seed: int) -> Iterator[Case]:
    """Across the sliding window: in one call, token by token, in a chunk, in a batch whose padding takes up slots."""
    window = limits.sliding_window
    if window is None:
        return
    length = min(window + 5, limits.max_length)
    row = distinct_ids(limits, length, seed + 6)
    yield Case("sliding prefill", chunk([row], [[length]]), exact=True)
    first = max(1, window - 3)
    if first < length:
        yield Case("sliding decode", chunk([row], [[first]] + [[1]] * (length - first)), exact=True)
        yield Case("sliding chunk", chunk([row], [[first], [length - first]]), exact=True)
    if limits.max_length >= 16:
        rows = [distinct_ids(limits, 16, seed + 7), distinct_ids(limits, 16, seed + 8)]
        yield Case("sliding batch", chunk(rows, [[7, 3], [1, 1], [4, 2], [1, 1], [1, 1]]), exact=True)


def _rope_cases(limits: Limits, seed: int) -> Iterator[Case]:
    """Around the length where RoPE changes: to it, over it, beyond it, and in a batch of which one row is over it.

    Whether a call shorter than that length follows a longer one, and the memory is lost, lies with the runner's user:
    a case cannot go back in a text.
    """
    original = limits.original_length
    if original is None:
        return
    end = min(2 * original + 3, limits.max_length)
    row = distinct_ids(limits, end, seed + 9)
    yield Case("rope prefill beyond", chunk([row], [[end]]), exact=True)
    if original > 1:
        steps = min(6, end - (original - 1))
        yield Case("rope decode over", chunk([row], [[original - 1]] + [[1]] * steps), exact=True)
    if original > 2 and end >= original + 6:
        sizes = [[original - 2], [5], [1], [end - original - 4]]
        yield Case("rope chunks over", chunk([row], sizes), exact=True)
        other = distinct_ids(limits, end, seed + 10)
        sizes = [[original, 2], [1, 1], [3, 2], [1, 1]]
        yield Case("rope batch", chunk([row, other], sizes), exact=True)


def natural_case(limits: Limits, text_ids: IntArray) -> Case:
    """Text with its repetitions, beyond the window where the bundle can hold that."""
    beyond = limits.keep_window_size + 48
    length = beyond if beyond <= limits.max_length else min(96, limits.max_length)
    row = np.resize(text_ids, length)
    steps = min(8, length - 1) if limits.task == "causal-lm" else 0
    return Case(NATURAL, chunk([row], [[length - steps]] + [[1]] * steps), exact=False)
