"""How the calls of a case are made, and what a bundle answers; `reference_run.py` makes the same in the reference.

Axes: B rows, Q tokens of a call, K cached keys after it, V vocabulary, N = B*Q, S heads of the score, k experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from doge_deploy.runtime.base import BundleRunner, FloatArray, IntArray
from doge_deploy.verify.cases import Call, Case
from doge_deploy.verify.compare import Array

Selections = Mapping[str, Array]
"""`kept.<layer>` `[B, S, Q, K]` bool in the reference's columns, `experts.<layer>` `[N, k]` int64."""


@dataclass(frozen=True)
class Choices:
    """What the reference itself selected in one call."""

    own: dict[str, Array]
    """As `Selections`; only where there was something to choose."""
    judged: dict[str, Array]
    """`[B, Q]` bool for keys, `[N]` for experts: the rows in which a bundle must choose the same."""

    def digests(self) -> dict[str, Array]:
        """The digest of every set of `own`, 0 where it is not judged; see `digests_of`."""
        result = {}
        for name, own in self.own.items():
            judged = self.judged[name][:, None] if name.startswith("kept.") else self.judged[name]
            result[name] = np.where(judged, digests_of(name, own), np.uint64(0))
        return result


def digests_of(name: str, selection: Array) -> Array:
    """A number for each set of a selection, the same for equal sets and else another, never 0.

    Args:
        name: `kept.<layer>` or `experts.<layer>`.
        selection: `[B, S, Q, K]` bool or `[N, k]` int64, see `Selections`.

    Returns:
        uint64 `[B, S, Q]` or `[N]`; of 64 bits, so that two sets have the same by chance once in 10^19.
    """
    if name.startswith("kept."):
        rows, shape = np.packbits(selection, axis=-1, bitorder="little"), selection.shape[:-1]
    else:
        rows, shape = np.sort(selection, axis=-1).astype("<i8"), selection.shape[:-1]
    flat = rows.reshape(-1, rows.shape[-1])
    # A set of keys does not depend on how many columns come after its last key.
    texts = (row.tobytes() for row in flat)
    if name.startswith("kept."):
        texts = (text.rstrip(b"\0") for text in texts)
    found = (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") | 1 for text in texts)
    return np.fromiter(found, np.uint64, len(flat)).reshape(shape)


@dataclass
class CandidateTrace:
    """A bundle's run of a case."""

    logits: list[Array]
    """Per call and row `[tokens, V]`, calls in order."""
    present: dict[str, list[Array]]
    """Per tensor and row, when all calls are done."""
    selections: list[Selections]
    """Per call, in the reference's columns; empty where the graph exposes none."""
    positions: dict[int, list[Array]] = field(default_factory=dict)
    """Per layer and row the tokens that `present` holds, `[Hkv, n_b]`; empty where it holds all."""

    def held(self, name: str, rows: list[Array]) -> list[Array]:
        """Of a reference's rows `[Hkv, n, D]` of the present tensor `name`, what the bundle holds too."""
        if not self.positions:
            return rows
        positions = self.positions[int(name.split(".")[1])]
        return [np.take_along_axis(row, held[..., None], axis=1) for row, held in zip(rows, positions, strict=True)]


@dataclass(frozen=True)
class Replay:
    """How one layout's calls are made in the reference."""

    padding: str
    """Where padding goes: "right" for static caches, "left" for growing ones, "masked" (on the right, and hidden by a
    mask) where there is no cache.
    """
    tokenwise: bool
    """Per-token routing equals transformers only at N = 1: every row and token is a call of its own there."""
    last_logits: bool
    sliding_window: int | None = None

    def held_slots(self, rows: list[Array]) -> list[Array]:
        """Of present rows `[Hkv, n, D]` what a sliding cache keeps: a static one has all of them."""
        return rows if self.sliding_window is None else [row[:, -(self.sliding_window - 1) :] for row in rows]

    def feed(self, runner: BundleRunner, case: Case) -> CandidateTrace:
        """Run `case` on a bundle."""
        trace = CandidateTrace([], {}, [])
        real = np.zeros((len(case.calls[0].lengths), 0), bool)
        runner.reset(len(real))
        for call in case.calls:
            trace.logits += feed_call(runner, call)
            before, real = real, np.concatenate((real, self._real(call)), axis=1)
            columns = [self._columns(*rows) for rows in zip(before, real, strict=True)]
            trace.selections.append(_selections(runner, columns, real.shape[1]))
        signature = {spec.name for spec in runner.signature.outputs}
        trace.present = {name: self.held_slots(rows) for name, rows in runner.cache().items() if name in signature}
        trace.positions = runner.held_positions()
        return trace

    def _columns(self, before: Array, real: Array) -> Array:
        """Columns of one row in the reference that a call's selections speak of, in the bundle's order.

        In a static cache the padding of this very call is among them: its rows see it, and a mixture that routes as the
        reference does carries what they see to real tokens.
        """
        if self.tokenwise and self.padding != "left":
            return np.arange(real.sum())
        if self.padding != "left":
            return np.concatenate((np.flatnonzero(before), np.arange(len(before), len(real))))
        return np.flatnonzero(real)

    def _real(self, call: Call) -> Array:
        """`[B, Q]`: where the real tokens of a call stand, in the order in which it is run."""
        width = call.input_ids.shape[1]
        columns = np.arange(width)
        lengths = call.lengths[:, None]
        real: Array = columns >= width - lengths if self.padding == "left" else columns < lengths
        return real


def feed_call(runner: BundleRunner, call: Call) -> list[Array]:
    """Run one call on a bundle; per row the logits of its real tokens, or of the last where the graph gives only
    that.
    """
    logits: FloatArray = runner.run(call.input_ids, call.lengths.tolist())
    return [logits[b] if runner.last_logits else logits[b, :n] for b, n in enumerate(call.lengths)]


def _selections(runner: BundleRunner, columns: Sequence[Array], total: int) -> Selections:
    """What the `doge` nodes of the last call selected, its keys moved to `columns[b]` of `total` reference columns."""
    result: dict[str, Array] = {}
    real = runner.real_columns()
    own = [np.arange(len(target)) for target in columns] if real is None else [np.flatnonzero(row) for row in real]
    for name, value in runner.extra.items():
        if not name.startswith("kept."):
            result[name] = value
            continue
        kept = np.zeros((*value.shape[:3], total), bool)
        # A sliding cache has lost the first columns.
        lost = 0 if real is None else real.shape[1] - value.shape[3]
        for b, (target, source) in enumerate(zip(columns, own, strict=True)):
            held = source >= lost
            kept[b][:, :, target[held]] = value[b][:, :, source[held] - lost]
        result[name] = kept
    return result


def greedy_calls(runner: BundleRunner, prompt: IntArray, steps: int) -> tuple[Call, ...]:
    """A bundle's own greedy continuation of `prompt` `[T]` as calls: the prompt, then each of its `steps` tokens."""
    runner.reset(1)
    calls = [Call(prompt[None], np.array([len(prompt)]))]
    for _ in range(steps):
        token = int(feed_call(runner, calls[-1])[0][-1].argmax())
        calls.append(Call(np.array([[token]]), np.ones(1, np.int64)))
    return tuple(calls)
