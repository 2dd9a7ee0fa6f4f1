"""Random schedules of what a server does with slots, each text compared with the same text run alone.

Texts are drawn, and no token comes twice in one: repeated tokens tie exactly in the first layer's scores (spec fact 11),
and then the keys that stay are a matter of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from doge_deploy.runtime.base import FloatArray, IntArray, Runner
from doge_deploy.runtime.slots import SlotRunner
from doge_deploy.verify.compare import Difference, difference
from doge_deploy.verify.noise import pool
from doge_deploy.verify.tolerance import Limit, limit

STEPS = 60
"""Operations of a schedule."""


@dataclass(frozen=True)
class Fed:
    """One call as a slot saw it."""

    ids: IntArray
    real: int
    """How many of them are still there: a text may have been cut since."""
    alone: bool
    """No other row was in the call, and no padding."""
    logits: FloatArray | None
    """What the call gave for the slot, `[Q or 1, V]`; None where it was compared before, or somewhere else."""


@dataclass
class Text:
    """What a slot holds, and how it got there."""

    unused: list[int]
    """Tokens that it does not hold."""
    calls: list[Fed] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(call.real for call in self.calls)

    def begin(self, tokens: int) -> list[Fed]:
        """The calls that left the first `tokens`."""
        calls, left = [], tokens
        for call in self.calls:
            if left:
                calls.append(replace(call, real=min(left, call.real), logits=None))
                left -= calls[-1].real
        return calls


@dataclass
class Findings:
    """What a comparison with texts alone found."""

    texts: int = 0
    calls: int = 0
    equal_bits: int = 0
    """Calls whose logits are those of the text alone, bit by bit."""
    other_tokens: int = 0
    """Greedy tokens that differ; each within the noise, or among the failures."""
    largest: float = 0.0
    """Largest error over what was allowed."""
    failures: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        for name in ("texts", "calls", "equal_bits", "other_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)
        self.failures += other.failures

    def __str__(self) -> str:
        return (
            f"{self.texts} texts, {self.calls} calls, {self.equal_bits} of them equal to the last bit, "
            f"{self.other_tokens} other greedy tokens, {self.largest:.2f} of the tolerance, {len(self.failures)} failures"
        )


def batch_noise(alone: Runner, rows: Sequence[int], vocab_size: int, texts: int = 6) -> Limit:
    """What the number of rows in a call may change: the same texts alone, and as every row of a batch.

    The limits are those of `verify` for that noise. A runner whose rows are equal cannot tell them apart, so this is no
    use of what is tested: slots, views and moves.
    """
    draws = []
    for seed in range(texts):
        ids = np.random.default_rng([9, seed]).permutation(vocab_size)[: alone.max_length]
        single = _one_text(alone, ids, 1)
        draws += [difference(_one_text(alone, ids, count), single) for count in rows]
    noise = pool(draws)
    return limit(
        "logits",
        "float32",
        noise_max=noise.max_abs,
        noise_rms=noise.rms,
        scale=noise.scale,
        count=noise.effective,
    )


def _one_text(runner: Runner, ids: IntArray, rows: int) -> list[FloatArray]:
    """Logits of a prefill in pieces and of decode steps, of the last of `rows` equal rows."""
    runner.reset(rows)
    parts = [ids[:7], ids[7:12], *(ids[at : at + 1] for at in range(12, len(ids)))]
    return [runner.run(np.tile(part, (rows, 1)))[-1] for part in parts]


class Schedule:
    """One schedule: what was done, and with what result.

    Args:
        runner: its slots must all be free.
        alone: a runner of the same bundle for one text at a time.
        allowed: see `batch_noise`.
    """

    def __init__(self, runner: SlotRunner, alone: Runner, allowed: Limit, seed: int) -> None:
        self.runner, self.alone, self.allowed = runner, alone, allowed
        self.rng = np.random.default_rng(seed)
        self.texts: dict[int, Text] = {}
        self.findings = Findings()
        self.log: list[str] = []

    def run(self, steps: int = STEPS) -> Findings:
        operations: dict[Callable[[], None], int] = {
            self.acquire: 4,
            self.prefill: 6,
            self.decode: 12,
            self.extend: 3,
            self.release: 2,
            self.copy: 3,
            self.truncate: 2,
        }
        weights = np.array(list(operations.values())) / sum(operations.values())
        for _ in range(steps):
            list(operations)[int(self.rng.choice(len(weights), p=weights))]()
        for slot in list(self.texts):
            self.check(slot)
            self.runner.release(slot)
        return self.findings

    def some(self, test: Callable[[int], bool] = lambda slot: True) -> int | None:
        """One of the slots in use for which `test` holds."""
        fitting = [slot for slot in self.texts if test(slot)]
        return int(self.rng.choice(fitting)) if fitting else None

    def room(self, slot: int) -> int:
        return self.runner.max_length - len(self.texts[slot])

    def acquire(self) -> None:
        if self.runner.free:
            slot = self.runner.acquire()
            self.log.append(f"acquire -> {slot}")
            assert slot not in self.texts and self.runner.length(slot) == 0
            self.texts[slot] = Text(self.rng.permutation(self.runner.vocab_size).tolist())

    def release(self) -> None:
        if (slot := self.some()) is not None:
            self.check(slot)
            self.log.append(f"release {slot}")
            self.runner.release(slot)
            del self.texts[slot]

    def prefill(self) -> None:
        """A prompt, whole or in pieces."""
        slot = self.some(lambda slot: self.room(slot) > 0)
        if slot is None:
            return
        length = min(self.room(slot), int(self.rng.integers(1, 24)))
        piece = length if self.rng.random() < 0.5 else int(self.rng.integers(1, length + 1))
        for begin in range(0, length, piece):
            ids = self.draw(slot, min(piece, length - begin))
            self.log.append(f"prefill {slot} {len(ids)}")
            self.note([slot], [ids], self.runner.prefill(slot, ids).numpy())

    def decode(self) -> None:
        self.feed(1)

    def extend(self) -> None:
        """Several tokens to several slots at once, as drafts of speculation are."""
        self.feed(int(self.rng.integers(2, 6)))

    def feed(self, most: int) -> None:
        fitting = [slot for slot in self.texts if self.room(slot) >= most]
        if not fitting:
            return
        count = int(self.rng.integers(1, len(fitting) + 1))
        slots = [int(slot) for slot in self.rng.permutation(fitting)[:count]]
        ids = [self.draw(slot, int(self.rng.integers(1, most + 1))) for slot in slots]
        self.log.append(f"feed {slots} {[len(each) for each in ids]}")
        if most == 1:
            logits = self.runner.decode(slots, [int(each[0]) for each in ids])
        else:
            logits = self.runner.extend(slots, ids)
        values = logits.numpy()
        assert np.array_equal(logits.argmax(), values.argmax(axis=-1)) or not np.isfinite(values).all()
        self.note(slots, ids, values)

    def copy(self) -> None:
        source = self.some(lambda slot: len(self.texts[slot]) > 0)
        target = self.some(lambda slot: slot != source)
        if source is None or target is None:
            return
        held = len(self.texts[source])
        tokens = int(self.rng.integers(1, held + 1)) if self.runner.can_cut(source) else held
        self.check(target)
        self.log.append(f"copy {source} -> {target} {tokens} of {held}")
        self.runner.copy(source, target, tokens)
        calls = self.texts[source].begin(tokens)
        self.texts[target] = Text([], calls)
        self.forget_drawn(target)

    def truncate(self) -> None:
        slot = self.some(lambda slot: len(self.texts[slot]) > 0 and self.runner.can_cut(slot))
        if slot is not None:
            self.check(slot)
            tokens = int(self.rng.integers(0, len(self.texts[slot]) + 1))
            self.log.append(f"truncate {slot} {tokens}")
            self.runner.truncate(slot, tokens)
            self.texts[slot].calls = self.texts[slot].begin(tokens)
            self.forget_drawn(slot)

    def forget_drawn(self, slot: int) -> None:
        held = {int(token) for call in self.texts[slot].calls for token in call.ids}
        ids = self.rng.permutation(self.runner.vocab_size).tolist()
        self.texts[slot].unused = [token for token in ids if token not in held]

    def draw(self, slot: int, count: int) -> IntArray:
        unused = self.texts[slot].unused
        return np.array([unused.pop() for _ in range(count)], np.int64)

    def note(self, slots: Sequence[int], ids: Sequence[IntArray], logits: FloatArray) -> None:
        alone = len(slots) == 1
        for row, slot, tokens in zip(logits, slots, ids, strict=True):
            own = row[: len(tokens)] if self.runner.all_logits else row
            self.texts[slot].calls.append(Fed(tokens, len(tokens), alone, own.copy()))
            if self.runner.length(slot) != len(self.texts[slot]):
                self.findings.failures.append(f"slot {slot} says that it holds {self.runner.length(slot)} tokens")

    def check(self, slot: int) -> None:
        """Compare what the slot's text gave with what it gives alone."""
        text = self.texts[slot]
        if not any(call.logits is not None for call in text.calls):
            return
        self.alone.reset(1)
        found, expected, exact = [], [], True
        for call in text.calls:
            values = self.alone.run(call.ids[None], [call.real])[0]
            exact = exact and call.alone
            if call.logits is None:
                continue
            found.append(call.logits)
            expected.append(values)
            self.findings.calls += 1
            self.findings.equal_bits += int(np.array_equal(call.logits, values))
            if exact and not np.array_equal(call.logits, values):
                self.findings.failures.append(f"slot {slot}: other bits, though it was fed alone")
        self.judge(slot, found, expected)
        text.calls = [replace(call, logits=None) for call in text.calls]

    def judge(self, slot: int, found: list[Any], expected: list[Any]) -> None:
        self.findings.texts += 1
        result: Difference = difference(found, expected)
        self.findings.largest = max(
            self.findings.largest, result.max_abs / self.allowed.max_abs, result.rms / self.allowed.rms
        )
        if not result.within(self.allowed):
            self.findings.failures.append(
                f"slot {slot}: logits differ by {result.max_abs:.3g} (allowed {self.allowed.max_abs:.3g}), rms "
                f"{result.rms:.3g} (allowed {self.allowed.rms:.3g}), {result.non_finite} not finite"
            )
            return
        mine, theirs = np.concatenate(found), np.concatenate(expected)
        other = np.flatnonzero(mine.argmax(-1) != theirs.argmax(-1))
        self.findings.other_tokens += len(other)
        for place in other:
            margin = theirs[place].max() - theirs[place, mine[place].argmax()]
            if margin > 2 * self.allowed.max_abs:
                self.findings.failures.append(f"slot {slot}: another token, with a margin of {margin:.3g}")
