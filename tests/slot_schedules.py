"""Random schedules of what a server does with slots, each text compared with the same text run alone.

Texts are drawn, and no token comes twice in one: repeated tokens tie exactly in the first layer's scores, and then the
keys that stay are a matter of rounding. Where two different tokens tie all the same, at the edge of the window and
within the noise of scores, what follows in that text is not compared (`Edge`), and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from doge_deploy.errors import UsageError
from doge_deploy.runtime.base import FloatArray, IntArray, Runner
from doge_deploy.runtime.slots import SlotRunner
from doge_deploy.verify.compare import Difference, difference
from doge_deploy.verify.noise import Noise, pool
from doge_deploy.verify.tolerance import AllowedDifference, limit

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
    tied_texts: int = 0
    """Texts of which the end was left out: two scores at the edge of the window were equal within their noise."""
    other_tokens: int = 0
    """Greedy tokens that differ; each within the noise, or among the failures."""
    largest: float = 0.0
    """Largest error over what was allowed."""
    failures: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        for name in ("texts", "calls", "equal_bits", "tied_texts", "other_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)
        self.failures += other.failures

    def __str__(self) -> str:
        return (
            f"{self.texts} texts, {self.calls} calls, {self.equal_bits} of them equal to the last bit, "
            f"{self.tied_texts} texts with ties, {self.other_tokens} other greedy tokens, "
            f"{self.largest:.2f} of the tolerance, "
            f"{len(self.failures)} failures"
        )


BEHIND = 8


def batch_noise(alone: Runner, rows: Sequence[int], vocab_size: int, texts: int = 6, *, behind: int = BEHIND) -> Noise:
    """What the number of rows in a call, and their length, may change: the same texts alone and in a batch.

    The rows of the batch hold the same tokens, the last one `behind` fewer of
    them: a runner that takes one row for another is not excused by this.
    """
    draws = []
    for seed in range(texts):
        ids = np.random.default_rng([9, seed]).permutation(vocab_size)[: alone.max_length]
        single = _one_text(alone, ids, 1, behind)
        draws += [difference(_one_text(alone, ids, count, behind), single) for count in rows]
    return pool(draws)


def graph_noise(alone: Runner, standard: Runner, vocab_size: int, texts: int = 6) -> Noise:
    """What 8-bit activations change: a graph that rounds them, and the standard one, which does not.

    There `batch_noise` is nearly always 0, and once in a while the smallest difference turns an activation into the
    next of the 256 that there are. How much that changes is seen where all of them are rounded.
    """
    draws = []
    for seed in range(texts):
        ids = np.random.default_rng([9, seed]).permutation(vocab_size)[: alone.max_length]
        draws.append(difference(_one_text(alone, ids, 1), _one_text(standard, ids, 1)))
    return pool(draws)


def allowed(noise: Noise, found: Difference) -> AllowedDifference:
    """What `verify` allows for that noise, in so many errors as were found."""
    count = min(noise.effective, found.effective)
    return limit("logits", "float32", noise_max=noise.max_abs, noise_rms=noise.rms, scale=noise.scale, count=count)


def _one_text(runner: Runner, ids: IntArray, rows: int, behind: int = BEHIND) -> list[FloatArray]:
    """Logits of a prefill, a piece and decode steps, of the last of `rows`, so many tokens behind the others."""
    runner.reset(rows)
    first = 4 + behind
    found = [runner.run(np.tile(ids[:first], (rows, 1)), [first] * (rows - 1) + [4])[-1][:4]]
    for begin, end in [(4, 9), *((at, at + 1) for at in range(9, len(ids) - behind))]:
        part = [ids[begin + behind : end + behind]] * (rows - 1) + [ids[begin:end]]
        found.append(runner.run(np.stack(part))[-1])
    return found


class Edge:
    """Where the keys that stay are a matter of rounding: a certificate for logits that differ after it.

    Args:
        standard: a runner of the bundle's standard graph, which holds the scores of all tokens.
        window: keep_window_size.
        behind: see `batch_noise`.
    """

    def __init__(self, standard: Runner, window: int, vocab_size: int, *, behind: int = BEHIND) -> None:
        self.standard, self.window = standard, window
        draws = []
        for seed in range(3):
            ids = np.random.default_rng([8, seed]).permutation(vocab_size)[: standard.max_length]
            scores = []
            for rows in (2, 1):
                _one_text(standard, ids, rows, behind)
                scores.append([kept[-1] for name, kept in standard.cache().items() if name.endswith(".score")])
            draws.append(difference(*scores))
        noise = pool(draws)
        self.epsilon = limit("kept", "float32", noise_max=noise.max_abs, noise_rms=noise.rms, scale=noise.scale).max_abs

    def first_tie(self, calls: Sequence[Fed]) -> int | None:
        """The first token of a text for which the last key that stays and the first that goes score the same."""
        self.standard.reset(1)
        for call in calls:
            self.standard.run(call.ids[None], [call.real])
        ties = []
        for name, rows in self.standard.cache().items():
            if name.endswith(".score"):
                scores = rows[0][..., 0]
                for token in range(self.window, scores.shape[1]):
                    seen = np.sort(scores[:, : token + 1], axis=1)[:, ::-1]
                    if (seen[:, self.window - 1] - seen[:, self.window]).min() <= self.epsilon:
                        ties.append(token)
                        break
        return min(ties, default=None)


class Schedule:
    """One schedule: what was done, and with what result.

    Args:
        runner: its slots must all be free.
        alone: a runner of the same bundle for one text at a time.
        noise: see `batch_noise`.
        edge: where the bundle can drop keys.
    """

    def __init__(self, runner: SlotRunner, alone: Runner, noise: Noise, seed: int, edge: Edge | None = None) -> None:
        self.runner, self.alone, self.noise, self.edge = runner, alone, noise, edge
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
            self.together: 3,
            self.release: 2,
            self.copy: 3,
            self.truncate: 2,
        }
        weights = np.array(list(operations.values())) / sum(operations.values())
        for _ in range(steps):
            try:
                list(operations)[int(self.rng.choice(len(weights), p=weights))]()
            except UsageError as refused:
                self.findings.failures.append(f"refused: {refused}")
                break
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

    def takes(self, slot: int, tokens: int) -> bool:
        """Whether a call may bring the slot as many tokens."""
        return self.room(slot) > 0 and (tokens == 1 or not self.runner.whole_prompts or not self.texts[slot].calls)

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
        slot = self.some(lambda slot: self.takes(slot, 2))
        if slot is None:
            return
        length = min(self.room(slot), int(self.rng.integers(1, 24)))
        whole = self.runner.whole_prompts or self.rng.random() < 0.5
        piece = length if whole else int(self.rng.integers(1, length + 1))
        for begin in range(0, length, piece):
            ids = self.draw(slot, min(piece, length - begin))
            self.log.append(f"prefill {slot} {len(ids)}")
            self.note([slot], [ids], self.runner.prefill(slot, ids).numpy())

    def decode(self) -> None:
        self.feed(1)

    def extend(self) -> None:
        """Several tokens to several slots at once, as drafts of speculation are."""
        self.feed(int(self.rng.integers(2, 6)))

    def together(self) -> None:
        """Prompts, or what is left of them, in one call, where the runner takes them so."""
        most = int(self.rng.integers(6, 25))
        if self.runner.joins([most, 1]):
            self.feed(most)

    def feed(self, most: int) -> None:
        fitting = [slot for slot in self.texts if self.room(slot) >= most and self.takes(slot, most)]
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
        found, expected, tokens, exact = [], [], [], True
        for call in text.calls:
            first = int(self.alone.row_lengths[0])
            values = self.alone.run(call.ids[None], [call.real])[0]
            exact = exact and call.alone
            if call.logits is None:
                continue
            found.append(call.logits)
            expected.append(values)
            tokens.append(np.arange(first, first + call.real)[-len(values) :])
            self.findings.calls += 1
            self.findings.equal_bits += int(np.array_equal(call.logits, values))
            if exact and not np.array_equal(call.logits, values):
                self.findings.failures.append(f"slot {slot}: other bits, though it was fed alone")
        self.judge(slot, np.concatenate(found), np.concatenate(expected), np.concatenate(tokens))
        text.calls = [replace(call, logits=None) for call in text.calls]

    def judge(self, slot: int, found: FloatArray, expected: FloatArray, tokens: IntArray) -> None:
        """Logits `[T, V]` of the slot and of the text alone, after the `tokens` `[T]` of the text."""
        self.findings.texts += 1
        result = difference([found], [expected])
        if not result.within(allowed(self.noise, result)) and self.edge is not None:
            tie = self.edge.first_tie(self.texts[slot].calls)
            if tie is not None:
                self.findings.tied_texts += 1
                found, expected = found[tokens < tie], expected[tokens < tie]
                result = difference([found], [expected])
        most = allowed(self.noise, result)
        self.findings.largest = max(self.findings.largest, result.max_abs / most.max_abs, result.rms / most.rms)
        if not result.within(most):
            self.findings.failures.append(
                f"slot {slot}: logits differ by {result.max_abs:.3g} (allowed {most.max_abs:.3g}), rms "
                f"{result.rms:.3g} (allowed {most.rms:.3g}), {result.non_finite} not finite"
            )
            return
        other = np.flatnonzero(found.argmax(-1) != expected.argmax(-1))
        self.findings.other_tokens += len(other)
        for place in other:
            margin = expected[place].max() - expected[place, found[place].argmax()]
            if margin > 2 * most.max_abs:
                self.findings.failures.append(f"slot {slot}: another token, with a margin of {margin:.3g}")
