"""When the engine's thread hands out what it has made: at once where somebody waits, together where nobody can tell."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
from scripted_requests import Digits
from scripted_slots import ScriptedSlots

from doge_deploy.runtime.logits import HostLogits
from doge_deploy.runtime.sampling import Sampler, SamplingOptions
from doge_deploy.serve import engine as engine_module
from doge_deploy.serve.engine import Engine
from doge_deploy.serve.request import Event, Finished, Produced, Request, Started
from doge_deploy.serve.scheduler import Limits, Scheduler


class Hand:
    """An engine whose steps are made here, under a clock that is set here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slots: int = 4) -> None:
        self.now = 0.0
        monkeypatch.setattr(engine_module, "perf_counter", lambda: self.now)
        self.delivered: list[list[tuple[str, Event]]] = []
        rows = ScriptedSlots(slots, max_length=512)
        self.engine = Engine(Scheduler(rows, Limits(step_tokens=8, alone_tokens=8)), self.delivered.append)
        self.scheduler = self.engine.scheduler

    def submit(self, name: str, prompt: int = 3, tokens: int = 50) -> None:
        ids = [5 + ord(name[0]) % 50] * prompt
        one = Request(name, ids, Sampler(SamplingOptions()), tokens, lambda event: None, Digits())
        self.engine.submit(one)

    def _read(self) -> None:
        """All that was asked for; the last message ends the reading, which else would wait for more."""
        self.engine._inbox.put(None)
        assert not self.engine._read_inbox()

    def step(self, seconds: float = 0.0) -> list[list[tuple[str, Event]]]:
        """What was delivered in a step of the engine that takes so long."""
        before = len(self.delivered)
        self._read()
        self.now += seconds
        self.scheduler.step()
        self.engine._after_call()
        return self.delivered[before:]


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    return Hand(monkeypatch)


def kinds(events: list[tuple[str, Event]]) -> list[type[Event]]:
    return [type(event) for _, event in events]


def test_the_first_token_goes_out_at_once(hand: Hand) -> None:
    hand.submit("a")
    (events,) = hand.step()
    assert kinds(events) == [Started, Produced]


def test_the_first_token_goes_out_at_once_also_where_something_else_just_did(hand: Hand) -> None:
    hand.submit("a", prompt=12)  # two pieces
    assert [kinds(events) for events in hand.step(0.0001)] == [[Started]]
    assert [kinds(events) for events in hand.step(0.0001)] == [[Produced]]


def test_tokens_of_short_steps_go_out_together(hand: Hand) -> None:
    hand.submit("a")
    hand.step()
    assert [hand.step(0.001) for _ in range(3)] == [[], [], []]
    (events,) = hand.step(0.0011)
    assert kinds(events) == [Produced] * 4
    assert hand.step(0.001) == []


def test_tokens_of_long_steps_go_out_each(hand: Hand) -> None:
    hand.submit("a")
    hand.step()
    for _ in range(5):
        (events,) = hand.step(0.005)
        assert kinds(events) == [Produced]


def test_tokens_do_not_wait_for_a_prompt_that_is_fed(hand: Hand) -> None:
    hand.submit("a")
    hand.step()
    assert hand.step(0.001) == []
    hand.submit("b", prompt=40)
    for _ in range(4):  # pieces of 8 tokens; each takes longer than a step
        before, *_ = hand.step(0.0001)
        assert ("a", Produced) in [(name, type(event)) for name, event in before], "held back while a piece was fed"


def test_an_end_goes_out_at_once_with_what_was_held(hand: Hand) -> None:
    hand.submit("a", tokens=4)
    hand.step()
    assert hand.step(0.0001) == [] and hand.step(0.0001) == []
    (events,) = hand.step(0.0001)
    assert kinds(events) == [Produced, Produced, Produced, Finished]


@pytest.mark.parametrize("do", [lambda hand: hand.engine.cancel("a"), lambda hand: hand.engine.ask(lambda _: None)])
def test_nothing_is_held_for_ever(hand: Hand, do: Callable[[Hand], object]) -> None:
    """Whatever else ends the steps: what was made goes out."""
    hand.submit("a", tokens=6)
    hand.step()
    hand.step(0.0001)
    do(hand)
    for _ in range(10):
        hand.step(0.0001)
    made = [event for events in hand.delivered for _, event in events]
    assert isinstance(made[-1], Finished) and not hand.engine._outbox


@pytest.mark.parametrize("running", [1, 2])
def test_a_prompt_that_comes_while_tokens_are_made_is_fed_before_the_next_ones(running: int) -> None:
    """In the engine's own thread: the request comes within a call of the runner."""
    rows, ended = ScriptedSlots(4, max_length=512), threading.Event()

    def delivered(events: list[tuple[str, Event]]) -> None:
        if any(name == "late" and isinstance(event, Finished) for name, event in events):
            ended.set()

    engine = Engine(Scheduler(rows), delivered)

    def submit(name: str, tokens: int) -> None:
        ids = [5 + ord(name[0]) % 50] * 3
        engine.submit(Request(name, ids, Sampler(SamplingOptions()), tokens, lambda event: None, Digits()))

    def fed_late(slots: Sequence[int], ids: Sequence[int]) -> HostLogits:
        logits = decode(slots, ids)
        if len(slots) == running and [kind for kind, _ in rows.calls].count("decode") == 10:
            submit("late", 1)
        return logits

    decode, rows.decode = rows.decode, fed_late  # type: ignore[method-assign]
    for number in range(running):
        submit(f"{number}", 100)
    engine.start()
    try:
        assert ended.wait(30)
    finally:
        engine.stop(30)
    kinds = [kind for kind, _ in rows.calls]
    tenth = [place for place, kind in enumerate(kinds) if kind == "decode"][9]
    assert kinds[tenth + 1] == "prefill"
