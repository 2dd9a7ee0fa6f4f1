"""The scheduler under anything: requests of every kind come, leave and fail in any order, and calls of the rows fail.

Each text is compared with a loop that makes one text alone and knows no slots (`alone_with`). Rows are scripted, so a
token that was drawn from another row, or behind a prefix that is not there, is another token.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from scripted_requests import EOS, Digits
from scripted_slots import ScriptedSlots

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.logits import HostLogits
from doge_deploy.runtime.logprobs import log_probabilities
from doge_deploy.runtime.sampling import Context, Sampler, SamplingOptions
from doge_deploy.serve.request import Event, Finished, Produced, PromptScored, Request, Started, State
from doge_deploy.serve.scheduler import Limits, QueueFullError, Scheduler

VOCAB = 13
LENGTH = 64
"""Tokens that a slot holds."""


class BrokenCallError(Exception):
    """A call of the rows that fails."""


class TroubledSlots(ScriptedSlots):
    """Rows whose logits are all different, of texts that nearly repeat themselves, and whose calls fail when told to.

    Args:
        window: a row that has held more tokens than this can no longer be cut.
    """

    def __init__(self, slots: int, *, window: int, whole: bool, **options: Any) -> None:
        super().__init__(slots, max_length=LENGTH, vocab=VOCAB, **options)
        self.window, self.whole_prompts = window, whole
        self.dropped: set[int] = set()
        """Slots that can no longer be cut."""
        self.fails: dict[str, bool] = {}
        """Calls of which kind fail the next time, and whether they leave something in the rows."""
        self.told: Callable[[str, Sequence[int]], None] = print
        """Gets the kind and the slots of a call that fails, before it does."""

    def _logits(self, history: list[int]) -> FloatArray:
        wrong = tuple(history) in self.nan_after
        return np.full(VOCAB, np.nan, np.float32) if wrong else logits_after(history)

    def _feed(self, slot: int, ids: Sequence[int]) -> FloatArray:
        found = super()._feed(slot, ids)
        if len(self.rows[slot]) > self.window:
            self.dropped.add(slot)
        return found

    def _may_fail(self, kind: str, slots: Sequence[int], leave: Callable[[], object] = int) -> None:
        if (leaves := self.fails.pop(kind, None)) is None:
            return
        if leaves:
            leave()
        self.told(kind, slots)
        raise BrokenCallError(kind)

    def prefill(self, slot: int, ids: Sequence[int]) -> HostLogits:
        assert not (self.whole_prompts and self.rows[slot])
        self._may_fail("prefill", [slot], lambda: self._feed(slot, ids[: len(ids) // 2 + 1]))
        return super().prefill(slot, ids)

    def extend(self, slots: Sequence[int], ids: Sequence[Sequence[int]], last: int = 1) -> HostLogits:
        kind = "extend" if len(slots) == 1 else "together"
        self._may_fail(kind, slots, lambda: self._feed(slots[-1], ids[-1]))
        return super().extend(slots, ids, last)

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> HostLogits:
        self._may_fail("decode", slots, lambda: self._feed(slots[0], [ids[0]]))
        return super().decode(slots, ids)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self._may_fail("copy", [target], self.rows[target].clear)
        assert self.can_cut(source) or tokens == len(self.rows[source])
        super().copy(source, target, tokens)
        self.dropped.discard(target)
        if source in self.dropped:
            self.dropped.add(target)

    def truncate(self, slot: int, tokens: int) -> None:
        self._may_fail("truncate", [slot])
        assert self.can_cut(slot) or tokens in (0, len(self.rows[slot]))
        super().truncate(slot, tokens)
        if not tokens:
            self.dropped.discard(slot)

    def can_cut(self, slot: int) -> bool:
        return slot not in self.dropped and not self.whole_prompts


def logits_after(history: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits `[VOCAB]` that depend on all of a text, highest where it repeats itself."""
    seed = zlib.crc32(np.asarray(history, np.int64).tobytes())
    logits = ((seed * np.arange(1, VOCAB + 1) * 2654435761 % 2**32) / 2**32).astype(np.float32) * 3
    logits[EOS] -= 2
    if len(history) >= 4 and seed % 16:
        logits[history[-4]] += 4
    return logits


@dataclass
class Turns:
    """A constraint: even and odd tokens take turns, `length` of them; at `stuck` none is allowed."""

    length: int
    stuck: int
    count: int = 0

    def allow(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        ids = np.arange(len(logits))
        allowed = (ids % 2 == self.count % 2) & (self.count != self.stuck)
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        assert token % 2 == self.count % 2
        self.count += 1

    @property
    def complete(self) -> bool:
        return self.count >= self.length


@dataclass(frozen=True)
class Wanted:
    """What a request asks for."""

    prompt: tuple[int, ...]
    tokens: int
    sampling: SamplingOptions
    stop: str | None
    constraint: Turns | None
    logprobs: int | None
    score_prompt: bool

    def request(self, name: str, send: Callable[[Event], None]) -> Request:
        return Request(
            name,
            list(self.prompt),
            Sampler(self.sampling),
            self.tokens,
            send,
            Digits(self.stop),
            frozenset({EOS}),
            logprobs=self.logprobs,
            speculate=self.logprobs is None,
            score_prompt=self.score_prompt,
            constraint=copy.copy(self.constraint),
        )


def alone_with(wanted: Wanted, nan_after: set[tuple[int, ...]]) -> tuple[list[int], str]:
    """The tokens of a text that is made alone, and why it ends."""
    prompt, sampler, constraint = wanted.prompt, Sampler(wanted.sampling), copy.copy(wanted.constraint)
    if wanted.score_prompt and any(prompt[:count] in nan_after for count in range(1, len(prompt) + 1)):
        return [], "error"
    context, made = Context(prompt), []
    while len(made) < wanted.tokens and len(context) <= LENGTH:
        logits = logits_after([*context])
        if tuple(context) in nan_after or (constraint is not None and constraint.count == constraint.stuck):
            return made, "error"
        made.append(sampler.pick(logits if constraint is None else constraint.allow(logits), context))
        context.append(made[-1])
        if made[-1] == EOS:
            return made, "stop"
        if constraint is not None:
            constraint.accept(made[-1])
        if wanted.stop is not None and wanted.stop in "".join(f"{token} " for token in made):
            return made, "stop"
        if constraint is not None and constraint.complete:
            return made, "stop"
    return made, "length"


@dataclass
class Asked:
    """A request on its way, and what is known of it."""

    wanted: Wanted
    request: Request
    expected: tuple[list[int], str] = ([], "")
    """Its tokens, and why it ends, if nothing happens to it."""
    events: list[Event] = field(default_factory=list)
    cancelled: bool = False
    broken: bool = False
    """A call failed that was for it, and not for several prompts."""

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, Produced)]

    @property
    def ended(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished)


def texts(vocab: int = VOCAB) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, vocab - 1), min_size=1, max_size=8)


SAMPLING = st.one_of(
    st.just(SamplingOptions()),
    st.builds(
        SamplingOptions,
        do_sample=st.just(True),
        temperature=st.sampled_from([0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 4, 50]),
        top_p=st.sampled_from([0.0, 0.7, 1.0]),
        min_p=st.sampled_from([0.0, 0.2]),
        seed=st.integers(0, 3),
        repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
        presence_penalty=st.sampled_from([-0.5, 0.0, 1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.7]),
        logit_bias=st.sampled_from([{}, {1: -100.0}, {3: 2.0, 900: 1.0}]),
    ),
)


class Trouble(RuleBasedStateMachine):
    """What clients, the engine and the rows may do."""

    @initialize(
        slots=st.integers(1, 4),
        sizes=st.tuples(*(st.sampled_from(sizes) for sizes in ([64, 64, 8, 3, 1], [64, 64, 16, 2], [64, 64, 16, 1]))),
        queue=st.sampled_from([(99, 9999), (99, 9999), (3, 60)]),
        speculates=st.sampled_from([True, True, False]),
        all_logits=st.sampled_from([True, True, False]),
        window=st.sampled_from([LENGTH, LENGTH, LENGTH, 20, 0]),
        whole=st.sampled_from([False, False, False, True]),
        joins=st.sampled_from([99, 99, 2, 1]),
        beginnings=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=20, max_size=24), min_size=2, max_size=2),
    )
    def begin(
        self,
        slots: int,
        sizes: tuple[int, int, int],
        queue: tuple[int, int],
        speculates: bool,
        all_logits: bool,
        window: int,
        whole: bool,
        joins: int,
        beginnings: list[list[int]],
    ) -> None:
        self.rows = TroubledSlots(slots, window=window, whole=whole, all_logits=all_logits, joins=joins)
        self.limits = Limits(*sizes, *queue)
        costs = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4} if speculates else None
        self.scheduler = Scheduler(self.rows, self.limits, costs, window)
        self.scheduler.clock = lambda: -float(len(self.rows.calls))  # goes backwards
        self.rows.told = self._told
        self.beginnings = beginnings
        self.asked: list[Asked] = []
        self.failures = 0
        self.ended = False
        """The rows cannot be used any more, and the engine has given up."""

    def _told(self, kind: str, slots: Sequence[int]) -> None:
        """A call for these slots fails; several prompts are then fed alone, and none of them has to end."""
        self.failures += 1
        for one in self._in(self.scheduler.active):
            one.broken = one.broken or (kind != "together" and one.request.slot in slots)

    # what clients do

    @rule(
        beginning=st.sampled_from([1, 3, 5, 7, 0, 2, 4]),
        kept=st.sampled_from([0, 0, 3, 17, 24]),
        more=st.lists(texts(), min_size=1, max_size=5),
        tokens=st.sampled_from([100, 30, 30, 12, 3, 1, 0]),
        sampling=SAMPLING,
        stop=st.sampled_from([None, None, None, "4 ", "7 1", "5 5 "]),
        constraint=st.sampled_from([None, None, None, Turns(4, -1), Turns(9, -1), Turns(99, 3)]),
        logprobs=st.sampled_from([None, None, None, 2]),
        scored=st.sampled_from([False, False, False, True]),
        nan_at=st.sampled_from([None] * 12 + [-2, 0, 3]),
        copies=st.sampled_from([1, 1, 3]),
    )
    def arrive(
        self,
        beginning: int,
        kept: int,
        more: list[list[int]],
        tokens: int,
        sampling: SamplingOptions,
        stop: str | None,
        constraint: Turns | None,
        logprobs: int | None,
        scored: bool,
        nan_at: int | None,
        copies: int,
    ) -> None:
        """Requests that come together; prompts often begin as others do, or go on where an answer ended."""
        if self.ended:
            return
        known = [*self.beginnings, *([*one.wanted.prompt, *one.tokens] for one in self.asked)]
        text = known[beginning % len(known)]
        made = []
        for number, end in enumerate(more * copies):
            prompt = tuple([*(text[:kept] if beginning % 2 else text), *end][:LENGTH])
            wanted = Wanted(prompt, tokens, sampling, stop, constraint, logprobs, scored and self.rows.all_logits)
            if nan_at is not None and number == 0:
                history = (*prompt, *alone_with(wanted, self.rows.nan_after)[0])
                self.rows.nan_after.add(history[: max(len(prompt) + nan_at, 1)])
            one = Asked(wanted, wanted.request(f"r{len(self.asked)}-{number}", print))
            one.request.send = one.events.append
            made.append(one)
        try:
            self.scheduler.submit_all([one.request for one in made])
        except QueueFullError:
            assert not any(one.events for one in made)
            return
        for one in made:
            one.expected = alone_with(one.wanted, self.rows.nan_after)
        self.asked += made

    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        if self.asked:
            one = self.asked[which % len(self.asked)]
            there = not one.ended
            assert self.scheduler.cancel(one.request.id) is there
            one.cancelled = one.cancelled or there

    # what the rows do

    @rule(kind=st.sampled_from(["prefill", "extend", "together", "decode"]), leaves=st.booleans())
    def fail_next(self, kind: str, leaves: bool) -> None:
        self.rows.fails[kind] = leaves

    @rule(
        kind=st.sampled_from(["copy", "truncate"]), leaves=st.booleans(), really=st.sampled_from([False] * 15 + [True])
    )
    def fail_for_good(self, kind: str, leaves: bool, really: bool) -> None:
        """What a row holds is not known then: the engine ends everything."""
        if really:
            self.rows.fails[kind] = leaves

    # what the engine does

    @rule()
    def make_tokens(self) -> None:
        before = [(one, len(one.tokens)) for one in self._in(self.scheduler.decoding)]
        self._do(self.scheduler.make_tokens)
        for one, count in before:
            assert len(one.tokens) > count or one.ended, "a text waits while others go on"

    @rule()
    def feed_prompts(self) -> None:
        scheduler, rows, calls, failures = self.scheduler, self.rows, len(self.rows.calls), self.failures
        queue = [*scheduler.prefilling, *(scheduler.waiting if scheduler.table.free() else ())]
        fed = [one.fed for one in queue]
        budget = self.limits.step_tokens + (0 if scheduler.decoding else self.limits.alone_tokens)
        self._do(scheduler.feed_prompts)
        if queue and failures == self.failures:
            assert queue[0].fed > fed[0] or queue[0].state is State.DONE, "who came first waits while others are fed"
        if not rows.whole_prompts:
            taken = [count if isinstance(count, int) else len(count) * max(count) for _, count in rows.calls[calls:]]
            assert sum(taken) <= budget, "a step took more than its budget"

    @rule(count=st.sampled_from([1, 4, 12, 30]))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            self.make_tokens()
            self.feed_prompts()

    def _do(self, half: Callable[[], None]) -> None:
        if self.ended:
            return
        try:
            half()
        except BrokenCallError as error:
            assert str(error) in ("copy", "truncate")
            self.scheduler.abort(error)
            self.ended = True

    def _in(self, requests: Sequence[Request]) -> list[Asked]:
        return [one for one in self.asked if one.request in requests]

    # what always holds

    @invariant()
    def books_are_right(self) -> None:
        scheduler = getattr(self, "scheduler", None)
        if scheduler is None:
            return
        for slot, tokens in () if self.ended else self.rows.rows.items():
            assert scheduler.table[slot].tokens == tokens, "the row holds something else"
        assert scheduler.waiting_tokens == sum(len(one.prompt_ids) for one in scheduler.waiting)
        slots = [one.slot for one in scheduler.active]
        assert None not in slots and len(set(slots)) == len(slots) == scheduler.table.busy
        assert all(scheduler.table[slot].busy for slot in slots if slot is not None)
        for request in scheduler.decoding:
            assert request.slot is not None and request.fed == len(scheduler.table[request.slot].tokens)
        there = [*scheduler.decoding, *scheduler.prefilling, *scheduler.waiting]
        assert len(set(there)) == len(there) and set(scheduler._ngrams) <= set(scheduler.decoding)
        for one in self.asked:
            assert one.ended is (one.request not in there) is (one.request.state is State.DONE)
            kinds = [type(event) for event in one.events]
            assert kinds.count(Finished) <= 1 and Finished not in kinds[:-1], "an event after the end"
            assert Started not in kinds[1:] and kinds.count(PromptScored) <= 1
            assert one.tokens == one.expected[0][: len(one.tokens)], "a token of another text"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        most = 10 + sum(len(one.wanted.prompt) + LENGTH + 4 for one in self.asked if not one.ended)
        for _ in range(most):
            if self.scheduler.idle:
                break
            self.make_tokens()
            self.feed_prompts()
            self.books_are_right()
        assert self.scheduler.idle and self.scheduler.table.busy == 0, "somebody waits for ever"
        for one in self.asked:
            self._check_end(one)
        counters = self.scheduler.counters
        assert sum(counters.finished.values()) == len(self.asked)
        assert counters.generated_tokens == sum(len(one.tokens) for one in self.asked)

    def _check_end(self, one: Asked) -> None:
        end = one.events[-1]
        assert isinstance(end, Finished)
        if end.reason == "cancelled":
            assert one.cancelled
        elif isinstance(end.error, BrokenCallError):
            assert one.broken or self.ended, "a call for others failed"
        elif end.reason == "error":
            assert isinstance(end.error, UnsupportedModelError), end.error
            assert self._is_wrong(one), "NaN of another text"
        else:
            assert (one.tokens, end.reason) == one.expected
            self._check_logprobs(one)

    def _check_logprobs(self, one: Asked) -> None:
        """They are those of the logits as the model gave them, whatever is allowed, penalized or likelier."""
        prompt, top = one.wanted.prompt, one.wanted.logprobs
        text = [*prompt, *one.tokens]
        known = [None] + [log_probabilities(logits_after(text[:at]), text[at], top or 0) for at in range(1, len(text))]
        made = [event.logprobs for event in one.events if isinstance(event, Produced)]
        assert made == [None if top is None else entry for entry in known[len(prompt) :]]
        scored = [list(event.entries) for event in one.events if isinstance(event, PromptScored)]
        assert scored == ([known[: len(prompt)]] if one.wanted.score_prompt else [])

    def _is_wrong(self, one: Asked) -> bool:
        """Whether there is no next token."""
        prompt, constraint = one.wanted.prompt, one.wanted.constraint
        begins = [prompt[:count] for count in range(1, len(prompt))] if one.wanted.score_prompt else []
        stuck = constraint is not None and constraint.stuck == len(one.tokens)
        return stuck or any(text in self.rows.nan_after for text in [*begins, (*prompt, *one.tokens)])


def check(examples: int, steps: int, **more: Any) -> None:
    run_state_machine_as_test(
        Trouble,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


def test_whatever_happens_each_text_is_what_it_is_alone() -> None:
    check(150, 30)


@pytest.mark.sweep
def test_the_same_in_many_more_orders() -> None:
    check(3000, 40)
