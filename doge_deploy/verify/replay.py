"""The same calls on both sides, and everything that is compared afterwards.

Axes: B rows, Q tokens of a call, K cached keys after it, V vocabulary, N = B*Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from doge_deploy.runtime.base import BundleRunner, FloatArray, IntArray
from doge_deploy.verify.cases import Call, Case
from doge_deploy.verify.compare import Array
from doge_deploy.verify.reference import Reference, ReferenceRows, Selections, Watch


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


@dataclass
class ReplayTrace:
    """The reference's run of the same case; fields as in `CandidateTrace` and `Watch`."""

    logits: list[Array] = field(default_factory=list)
    present: dict[str, list[Array]] = field(default_factory=dict)
    router: dict[int, list[Array]] = field(default_factory=dict)
    violation: dict[str, float] = field(default_factory=dict)
    classes: list[Array] = field(default_factory=list)
    gap: float = float("inf")
    differing: int = 0

    def note(self, watch: Watch) -> None:
        """Take over what was seen in one call."""
        self.gap = min(self.gap, watch.gap)
        self.differing += watch.differing
        self.classes += [row.double().numpy() for row in watch.classes]
        for name, value in watch.violation.items():
            self.violation[name] = max(self.violation.get(name, 0.0), value)
        for layer, halves in watch.router.items():
            self.router.setdefault(layer, []).append(halves.double().numpy())


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

    def _held(self, rows: list[Array]) -> list[Array]:
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
        trace.present = {name: self._held(rows) for name, rows in runner.cache().items() if name in signature}
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

    def run(
        self, reference: Reference, case: Case, given: Sequence[Selections] | None = None, *, use_given: bool = True
    ) -> ReplayTrace:
        """Run `case` on the reference; `given[c]` are selections for call c, see `Reference.__call__`."""
        batch = len(case.calls[0].lengths)
        single = self.tokenwise
        ragged = not single and any(call.lengths.min() < call.input_ids.shape[1] for call in case.calls)
        rows = [
            ReferenceRows(reference, 1 if single else batch, self.padding, ragged=ragged)
            for _ in range(batch if single else 1)
        ]
        trace = ReplayTrace()
        scores: list[dict[int, torch.Tensor]] = [{} for _ in rows]
        for index, call in enumerate(case.calls):
            selected = given[index] if given is not None else None
            if single:
                logits = self._run_tokenwise(rows, call, selected, use_given, trace, scores)
            else:
                logits, watch = rows[0].run(call.input_ids, call.lengths, selected, use_given=use_given)
                trace.note(watch)
                scores[0] = watch.scores
            trace.logits += [(row[-1:] if self.last_logits else row).double().numpy() for row in logits]
        for row, row_scores in zip(rows, scores, strict=True):
            for name, tensors in row.present(row_scores).items():
                held = self._held([tensor.double().numpy() for tensor in tensors])
                trace.present.setdefault(name, []).extend(held)
        return trace

    def _run_tokenwise(
        self,
        rows: Sequence[ReferenceRows],
        call: Call,
        given: Selections | None,
        use_given: bool,
        trace: ReplayTrace,
        scores: list[dict[int, torch.Tensor]],
    ) -> list[torch.Tensor]:
        width = call.input_ids.shape[1]
        lengths = [int(length) for length in call.lengths]
        # Padding on the left takes up slots of the cache: it is fed too. That on the right is overwritten.
        added = lengths if self.padding == "left" else [width] * len(rows)
        longest = max(int(row.real.sum()) + count for row, count in zip(rows, added, strict=True))
        logits = []
        for b, row in enumerate(rows):
            offset = width - lengths[b] if self.padding == "left" else 0
            outputs = []
            for column in range(offset + lengths[b]):
                part = _of_token(given, b, column, width, row.real.shape[1] + 1) if given else None
                q = max(column - offset, 0)
                real = np.array([int(column >= offset)])
                ids = call.input_ids[b : b + 1, q : q + 1]
                (output,), watch = row.run(ids, real, part, use_given=use_given, longest=longest)
                if real:
                    outputs.append(output)
                    trace.note(watch)
                scores[b] = watch.scores
            logits.append(torch.cat(outputs))
        return logits


def _of_token(given: Selections, row: int, token: int, width: int, held: int) -> Selections:
    """The part of a call's selections that belongs to one token, which sees `held` keys."""
    return {
        name: selection[row : row + 1, :, token : token + 1, :held]
        if name.startswith("kept.")
        else selection[row * width + token][None]
        for name, selection in given.items()
    }


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
