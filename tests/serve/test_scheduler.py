"""The scheduler on rows that are scripted: what each request gets is what it gets alone, whatever its neighbours."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from scripted_requests import EOS, Answer, Digits, alone, make, request, run
from scripted_slots import VOCAB, next_token, repeating

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.runtime.sampling import SamplingOptions
from doge_deploy.runtime.speculation import NgramIndex
from doge_deploy.serve import scheduler as scheduler_module
from doge_deploy.serve.request import Finished, Produced, PromptScored, Request, Started, State
from doge_deploy.serve.scheduler import Limits, QueueFullError, Scheduler


def test_one_request() -> None:
    scheduler = make()
    one, answer = request([5, 6, 7])
    scheduler.submit(one)
    run(scheduler)
    assert answer.tokens == alone([5, 6, 7], 8)
    assert answer.finished.reason == "length" and one.state is State.DONE
    assert answer[0] == Started(0)


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("all_logits", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_any_schedule_gives_each_request_what_it_gets_alone(seed: int, all_logits: bool, cuts: bool) -> None:
    random_ = random.Random(seed)
    limits = Limits(
        step_tokens=random_.choice([1, 3, 8, 64]),
        alone_tokens=random_.choice([2, 64]),
        together_tokens=random_.choice([1, 16, 64]),
    )
    costs = random_.choice([None, {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4}])
    rule = random_.choice([next_token, repeating])
    rows = {"all_logits": all_logits, "cuts": cuts, "rule": rule, "joins": random_.choice([1, 2, 99])}
    scheduler = make(random_.randint(1, 6), limits=limits, costs=costs, **rows)
    prefixes = [[random_.randrange(2, VOCAB) for _ in range(random_.randint(1, 30))] for _ in range(3)]
    expected, reasons, answers, scored = {}, {}, {}, {}

    def arrive(name: str) -> None:
        """One request, or three with one prompt; some fill their slot, some ask for one token or have a stop text."""
        prompt = random_.choice(prefixes)[: random_.randint(1, 30)]
        prompt = prompt + [random_.randrange(2, VOCAB) for _ in range(random_.choice([0, 3, 6, 64 - len(prompt)]))]
        tokens = random_.choice([1, random_.randint(1, 20), 100])
        for choice in range(random_.choice([1, 1, 3])):
            each = f"{name}-{choice}"
            text = alone(prompt, min(tokens, scheduler.runner.max_length + 1 - len(prompt)), rule)
            stop = f"{random_.choice(text)} " if random_.random() < 0.2 else None
            expected[each], reasons[each] = cut_at(text, stop)
            changes = {"stop": stop, "score_prompt": all_logits and random_.random() < 0.1}
            one, answers[each] = request(prompt, name=each, tokens=tokens, **changes)
            if one.score_prompt:
                scored[each] = prompt
            scheduler.submit(one)

    for step in range(400):
        for number, half in enumerate((scheduler.make_tokens, scheduler.feed_prompts)):
            for more in range(random_.choice([1, 1, 4]) if step < 150 and random_.random() < 0.08 else 0):
                arrive(f"r{step}-{number}-{more}")
            if random_.random() < 0.03 and expected:
                name = random_.choice(sorted(expected))
                if scheduler.cancel(name):
                    reasons[name] = "cancelled"
            half()
            held = scheduler.runner.rows
            assert all(scheduler.table[slot].tokens == tokens for slot, tokens in held.items())
            assert scheduler.waiting_tokens == sum(len(one.prompt_ids) for one in scheduler.waiting)
    run(scheduler)
    assert len(answers) > 10
    for name, answer in answers.items():
        if reasons[name] == "cancelled":
            assert answer.tokens == expected[name][: len(answer.tokens)]
        else:
            assert answer.tokens == expected[name]
            scores = [event.entries for event in answer if isinstance(event, PromptScored)]
            assert [len(entries) for entries in scores] == ([len(scored[name])] if name in scored else [])
        assert answer.finished.reason == reasons[name]
        assert sum(isinstance(event, Finished) for event in answer) == 1
    assert scheduler.table.busy == 0


def cut_at(text: Sequence[int], stop: str | None) -> tuple[list[int], str]:
    """Tokens up to that with which a stop text is whole, and why a text of them ends."""
    for end in range(1, len(text) + 1):
        if stop is not None and stop in "".join(f"{token} " for token in text[:end]):
            return list(text[:end]), "stop"
    return list(text), "stop" if text[-1] == EOS else "length"


def test_a_long_prompt_delays_the_next_token_of_others_by_one_chunk() -> None:
    scheduler = make(limits=Limits(step_tokens=8), max_length=512)
    first, answer = request([5], tokens=100)
    scheduler.submit(first)
    scheduler.step()
    long, _ = request(range(2, 90), name="long")
    scheduler.submit(long)
    rows = scheduler.runner
    while long.state is not State.DECODE:
        before, calls = len(answer.tokens), len(rows.calls)
        scheduler.step()
        assert len(answer.tokens) == before + 1
        (_, one), (kind, chunk) = rows.calls[calls:]
        assert one == 1 and kind == "prefill" and chunk <= 8


def test_events_are_sent_call_by_call() -> None:
    scheduler = make(4, limits=Limits(step_tokens=8), joins=1)
    told: list[tuple[str, ...]] = []
    sent: list[str] = []

    def after_call() -> None:
        told.append(tuple(sent))
        sent.clear()

    scheduler.after_call = after_call
    for name in "abcd":
        one, _ = request([5, 6, ord(name)], name=name, tokens=2)
        one.send = lambda event, name=name: sent.append(name) if isinstance(event, Produced) else None
        scheduler.submit(one)
    scheduler.step()
    assert told == [("a",), ("b",), ("c",)], "the first token of one prompt does not wait for the next prompt"
    told.clear()
    scheduler.step()
    assert told == [("a", "b", "c"), ("d",)]


def test_prompts_are_fed_in_large_chunks_where_nobody_waits_for_a_token() -> None:
    scheduler = make(2, limits=Limits(step_tokens=8), max_length=512)
    scheduler.submit(request(range(2, 90), tokens=50)[0])
    scheduler.step()
    assert scheduler.runner.calls == [("prefill", 88)]
    scheduler.submit(request(range(3, 90))[0])
    scheduler.step()
    assert scheduler.runner.calls[1:] == [("decode", 1), ("prefill", 8)]


def test_a_prompt_is_cut_only_where_a_whole_budget_is_not_enough_for_it() -> None:
    scheduler = make(4, limits=Limits(step_tokens=8), joins=1)
    scheduler.submit(request([5], tokens=50)[0])
    scheduler.step()
    for length in (5, 4, 3):
        one, answer = request([length] * length, name=f"of {length}", tokens=50)
        scheduler.submit(one)
    scheduler.runner.calls.clear()
    scheduler.step()
    assert scheduler.runner.calls == [("decode", 1), ("prefill", 5)]
    scheduler.step()
    assert scheduler.runner.calls[2:] == [("decode", 2), ("prefill", 4), ("prefill", 3)]
    run(scheduler)
    assert sum(isinstance(event, Started) for event in answer) == 1


def test_a_slot_is_free_within_one_step_of_a_cancellation() -> None:
    scheduler = make(1)
    first, answer = request([5], name="first", tokens=50)
    second, other = request([6], name="second", tokens=3)
    scheduler.submit(first)
    scheduler.submit(second)
    scheduler.step()
    assert scheduler.cancel("first") and not scheduler.cancel("first") and not scheduler.cancel("nobody")
    assert answer.finished.reason == "cancelled"
    scheduler.step()
    assert second.slot == 0
    run(scheduler)
    assert other.tokens == alone([6], 3)


@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_a_request_can_be_cancelled_in_every_state(when: str) -> None:
    scheduler = make(1, limits=Limits(alone_tokens=2))
    other, others = request([9], name="other", tokens=4)
    one, answer = request(range(2, 12), name="one", tokens=50)
    for each in (other, one) if when == "queued" else (one, other):
        scheduler.submit(each)
    while one.state.value != when:
        scheduler.step()
    scheduler.cancel("one")
    run(scheduler)
    assert answer.finished.reason == "cancelled" and others.tokens == alone([9], 4)


def test_the_next_turn_of_a_conversation_feeds_only_what_is_new() -> None:
    scheduler = make(2)
    one, answer = request(range(2, 20), tokens=5)
    scheduler.submit(one)
    run(scheduler)
    turn = [*range(2, 20), *answer.tokens, 50, 51]
    two, later = request(turn, tokens=3)
    scheduler.submit(two)
    run(scheduler)
    # the last token of an answer is in the text, and was never fed
    assert later.cached == 18 + 4 and later.tokens == alone(turn, 3)


def test_a_prefix_is_copied_from_a_request_that_is_running() -> None:
    scheduler = make(2)
    system = list(range(2, 40))
    one, _ = request([*system, 60], name="one", tokens=20)
    two, answer = request([*system, 70], name="two", tokens=3)
    scheduler.submit(one)
    scheduler.submit(two)  # both are admitted in one step; the second is fed after the first
    run(scheduler)
    assert answer.cached == len(system) and answer.tokens == alone([*system, 70], 3)
    assert scheduler.counters.prefix_hits == len(system)


def test_another_users_conversation_is_not_thrown_away_for_a_short_prefix() -> None:
    scheduler = make(3, max_length=128)
    system = list(range(2, 20))
    one, first = request([*system, *range(40, 80)], name="one", tokens=2)
    scheduler.submit(one)
    run(scheduler)
    two, second = request([*system, 90], name="two", tokens=2)
    scheduler.submit(two)
    run(scheduler)
    assert second.cached == len(system)
    again, third = request([*system, *range(40, 80), *first.tokens, 30], name="again", tokens=2)
    scheduler.submit(again)
    run(scheduler)
    assert third.cached == len(system) + 40 + 1


def test_rows_that_cannot_go_back_are_reused_only_whole() -> None:
    scheduler = make(1, cuts=False)
    for prompt, cached in ([2, 3, 4], 0), ([2, 3, 4, *alone([2, 3, 4], 2), 9], 4), ([2, 3, 5], 0):
        one, answer = request(prompt, tokens=2)
        scheduler.submit(one)
        run(scheduler)
        assert answer.cached == cached and answer.tokens == alone(prompt, 2)


def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    scheduler = make(1, limits=Limits(queue_requests=2, queue_tokens=10))
    scheduler.submit(request([5] * 20)[0])  # has the slot
    scheduler.submit(request([5] * 9)[0])
    with pytest.raises(QueueFullError, match="11 prompt tokens would be waiting; the limit is 10"):
        scheduler.submit(request([5, 5])[0])
    scheduler.submit(request([5])[0])
    with pytest.raises(QueueFullError, match="3 requests would be waiting; the limit is 2"):
        scheduler.submit(request([5])[0])
    scheduler.step()
    with pytest.raises(QueueFullError, match="3 requests would be waiting; the limit is 2"):
        scheduler.submit(request([5])[0])


def check_full_with(scheduler: Scheduler, made: Sequence[tuple[Request, Answer]]) -> None:
    """It takes all of them, not one more, and answers each."""
    for one, _ in made:
        scheduler.submit(one)
    with pytest.raises(QueueFullError):
        scheduler.submit(request([5])[0])
    run(scheduler)
    assert all(answer.finished.reason == "length" for _, answer in made)


def test_who_gets_a_free_slot_does_not_wait() -> None:
    """However many come between two steps."""
    scheduler = make(3, limits=Limits(queue_requests=1, queue_tokens=4))
    made = [request([5, 6, place], name=str(place), tokens=2) for place in range(4)]
    check_full_with(scheduler, made)


def test_of_requests_that_belong_together_all_are_taken_or_none() -> None:
    scheduler = make(1, limits=Limits(queue_requests=2, queue_tokens=10))
    for prompts in ([[5]] * 4, [[5], [5] * 9, [5] * 2], [[5], [5] * 65]):
        made = [request(prompt) for prompt in prompts]
        with pytest.raises((QueueFullError, ValueError)):
            scheduler.submit_all([one for one, _ in made])
        assert scheduler.idle and scheduler.waiting_tokens == 0 and not any(answer for _, answer in made)
    made = [request([5], tokens=2) for _ in range(3)]
    scheduler.submit_all([one for one, _ in made])
    run(scheduler)
    assert scheduler.counters.finished == {"length": 3}


def test_a_prompt_longer_than_the_queues_limit_can_be_served_alone() -> None:
    scheduler = make(1, limits=Limits(queue_tokens=3))
    one, answer = request([5] * 9, tokens=1)
    scheduler.submit(one)
    run(scheduler)
    assert answer.finished.reason == "length"


def test_one_prompt_longer_than_the_queues_limit_may_wait() -> None:
    scheduler = make(1, limits=Limits(queue_tokens=3))
    made = [request([5] * 9, name=name, tokens=1) for name in "ab"]
    check_full_with(scheduler, made)


def test_a_conversation_stays_in_its_slot() -> None:
    """A copy of it in another one would be what is thrown away next of somebody else's."""
    scheduler = make(2)
    one, answer = request(range(2, 20), tokens=5)
    scheduler.submit(one)
    run(scheduler)
    scheduler.submit(request([*range(2, 20), *answer.tokens, 50], tokens=3)[0])
    run(scheduler)
    assert sorted(len(row) > 0 for row in scheduler.runner.rows.values()) == [False, True]


def test_requests_are_admitted_in_the_order_of_their_arrival() -> None:
    scheduler = make(1)
    order: list[str] = []
    for name in "abc":
        one, _ = request([5, 6], name=name, tokens=2)
        one.send = lambda event, name=name: order.append(name) if isinstance(event, Started) else None
        scheduler.submit(one)
    run(scheduler)
    assert order == ["a", "b", "c"]


def test_nan_in_one_row_fails_that_request_alone_and_its_row_is_not_used_again() -> None:
    scheduler = make(2)
    bad, wrong = request([5, 6, 7], name="bad")
    good, right = request([8, 9], name="good")
    scheduler.runner.nan_after.add((5, 6, 7, *alone([5, 6, 7], 3)))
    scheduler.submit(bad)
    scheduler.submit(good)
    run(scheduler)
    assert wrong.finished.reason == "error" and isinstance(wrong.finished.error, UnsupportedModelError)
    assert wrong.tokens == alone([5, 6, 7], 3)
    assert right.tokens == alone([8, 9], 8)
    assert [] in scheduler.runner.rows.values()


def test_an_error_of_the_runner_ends_the_requests_of_that_call_and_no_later_one() -> None:
    scheduler = make(2)
    one, answer = request([5], name="one", tokens=30)
    scheduler.submit(one)
    scheduler.step()
    original, scheduler.runner.decode = scheduler.runner.decode, lambda slots, ids: 1 / 0
    scheduler.step()
    assert isinstance(answer.finished.error, ZeroDivisionError)
    scheduler.runner.decode = original
    two, later = request([5], name="two", tokens=4)
    scheduler.submit(two)
    run(scheduler)
    assert later.tokens == alone([5], 4)


def test_abort_ends_everything() -> None:
    scheduler = make(1)
    answers = []
    for name in "abc":
        one, answer = request([5], name=name, tokens=30)
        answers.append(answer)
        scheduler.submit(one)
    scheduler.step()
    scheduler.runner.truncate = lambda slot, tokens: 1 / 0  # it may be what failed
    scheduler.abort(RuntimeError("shutting down"))
    assert scheduler.idle and all(str(answer.finished.error) == "shutting down" for answer in answers)
    assert scheduler.counters.finished == {"error": 3} and scheduler.table.busy == 0


def test_a_full_row_ends_a_text() -> None:
    scheduler = make(1, max_length=8)
    one, answer = request([5, 6, 7], tokens=100)
    scheduler.submit(one)
    run(scheduler)
    assert answer.finished.reason == "length" and answer.tokens == alone([5, 6, 7], 6)


def test_a_stop_text_ends_a_request() -> None:
    scheduler = make(1)
    third = alone([5, 6], 3)[2]
    one, answer = request([5, 6], tokens=100, stop=f"{third} ")
    scheduler.submit(one)
    run(scheduler)
    assert answer.finished.reason == "stop" and len(answer.tokens) == 3


class Enough:
    """A constraint under which nothing may follow after so many tokens."""

    def __init__(self, left: int) -> None:
        self.left = left

    def allow(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return logits

    def accept(self, token: int) -> None:
        self.left -= 1

    @property
    def complete(self) -> bool:
        return self.left == 0


class Late(Digits):
    """Gives each token out with the next one."""

    late = ""

    def push(self, token: int) -> str:
        given, self.late = self.late, super().push(token)
        return given

    def flush(self) -> str:
        return self.late


@pytest.mark.parametrize("end", ["length", "eos", "complete", "error"])
def test_what_was_withheld_comes_with_the_end(end: str) -> None:
    scheduler = make(1)
    text = alone([5, 6], 5)
    if end == "error":
        scheduler.runner.nan_after.add((5, 6, *text))
    changes = {"eos": {"eos_ids": frozenset({text[-1]})}, "complete": {"constraint": Enough(5)}}.get(end, {})
    one, answer = request([5, 6], tokens=5 if end == "length" else 50, text=Late(), **changes)
    scheduler.submit(one)
    run(scheduler)
    assert answer.finished.reason == {"eos": "stop", "complete": "stop"}.get(end, end) and answer.tokens == text
    given = "".join(event.text for event in answer if isinstance(event, Produced | Finished))
    assert given == "".join(f"{token} " for token in (text[:-1] if end == "eos" else text))


def test_a_stop_text_that_shows_with_the_end_is_why_a_text_ends() -> None:
    class Stopping(Late):
        def flush(self) -> str:
            self.stopped = True
            return ""

    scheduler = make(1)
    one, answer = request([5, 6], tokens=3, text=Stopping())
    scheduler.submit(one)
    run(scheduler)
    assert answer.finished == Finished("stop") and len(answer.tokens) == 3


def test_logprobs_are_those_of_the_distribution_before_the_temperature() -> None:
    scheduler = make(1)
    options = SamplingOptions(do_sample=True, temperature=0.01, seed=0)
    one, answer = request([5, 6], tokens=1, logprobs=3, sampling=options)
    scheduler.submit(one)
    run(scheduler)
    (produced,) = (event for event in answer if isinstance(event, Produced))
    assert produced.logprobs is not None
    assert produced.logprobs.logprob == pytest.approx(-0.01179, abs=1e-4)  # 9 - log(e^9 + 96)
    assert [token for token, _ in produced.logprobs.top] == [produced.token, 0, 1]


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_prompt_is_scored_whole_whatever_the_chunks(chunk: int) -> None:
    scheduler = make(1, limits=Limits(alone_tokens=chunk))
    prompt = [5, 6, next_token([5, 6]), 9]
    for _ in range(2):  # the second time the slot holds all of it
        one, answer = request(prompt, tokens=0, logprobs=0, score_prompt=True)
        scheduler.submit(one)
        run(scheduler)
        (scored,) = (event for event in answer if isinstance(event, PromptScored))
        assert [entry and entry.token for entry in scored.entries] == [None, *prompt[1:]]
        likely = [entry is not None and entry.logprob > -1 for entry in scored.entries]
        assert likely == [False, False, True, False]
        assert answer.finished.reason == "length" and answer.tokens == []


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("known", [2, 4], ids=["within", "at the end"])
def test_a_prompt_that_is_scored_with_nan_fails_alone(tokens: int, chunk: int, known: int) -> None:
    prompt = [5, 6, 7, 8]
    scheduler = make(2, limits=Limits(alone_tokens=chunk))
    scheduler.runner.nan_after.add(tuple(prompt[:known]))
    bad, wrong = request(prompt, name="bad", tokens=tokens, logprobs=0, score_prompt=True)
    good, right = request([8, 9], name="good")
    scheduler.submit(bad)
    scheduler.submit(good)
    run(scheduler)
    assert isinstance(wrong.finished.error, UnsupportedModelError)
    assert f"after {known} tokens hold NaN" in str(wrong.finished.error)
    assert not any(isinstance(event, PromptScored) for event in wrong) and right.tokens == alone([8, 9], 8)
    assert scheduler.counters.finished == {"error": 1, "length": 1} and [] in scheduler.runner.rows.values()


COSTS = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4}


class TestSpeculation:
    def test_a_text_that_repeats_itself_takes_fewer_calls_and_stays_the_same(self) -> None:
        counts = {}
        for costs in (None, COSTS):
            scheduler = make(1, costs=costs, rule=repeating, max_length=256)
            one, answer = request([5, 6, 7, 8, 9], tokens=100)
            scheduler.submit(one)
            run(scheduler)
            assert answer.tokens == alone([5, 6, 7, 8, 9], 100, repeating)
            counts[costs is None] = len(scheduler.runner.calls)
        assert counts[False] * 3 < counts[True]

    @pytest.mark.parametrize("end", ["eos", "stop", "complete"])
    def test_a_text_that_ends_within_a_guess_goes_no_further(self, end: str) -> None:
        scheduler = make(1, costs=COSTS, rule=repeating, max_length=256)
        prompt = [5, 6, 7, 8, EOS if end == "eos" else 9, 5]
        changes = {"stop": {"stop": "9 "}, "complete": {"constraint": Enough(4)}}.get(end, {})
        one, answer = request(prompt, tokens=20, **changes)
        scheduler.submit(one)
        run(scheduler)
        assert answer.tokens == [6, 7, 8, prompt[4]] and answer.finished == Finished("stop")
        assert one.drafts > one.accepted > 0
        assert scheduler.runner.rows[0] == scheduler.table[0].tokens == [*prompt, 6, 7, 8]

    @pytest.mark.parametrize("tokens", range(7, 16))
    def test_no_guess_reaches_beyond_the_last_token(self, tokens: int) -> None:
        scheduler = make(1, costs=COSTS, rule=repeating, max_length=256)
        one, answer = request([5, 6, 7, 8, 9], tokens=tokens)
        scheduler.submit(one)
        run(scheduler)
        assert answer.tokens == alone([5, 6, 7, 8, 9], tokens, repeating) and one.drafts > 0
        assert sum(count for _, count in scheduler.runner.calls) <= 5 + tokens - 1, "the last token is not fed"

    def test_nothing_is_guessed_for_who_wants_none(self) -> None:
        scheduler = make(1, costs=COSTS, rule=repeating)
        scheduler.submit(request([5, 6, 7, 8, 9], tokens=30, speculate=False)[0])
        run(scheduler)
        assert scheduler.counters.draft_tokens == 0

    def test_who_waits_for_the_only_slot_does_not_stop_guesses(self) -> None:
        scheduler = make(1, costs=COSTS, rule=repeating)
        made = [request([5, 6, 7, 8, 9], name=name, tokens=30)[0] for name in "ab"]
        scheduler.submit_all(made)
        run(scheduler)
        assert made[0].accepted > 10

    def test_it_gives_up_where_guesses_are_wrong(self) -> None:
        """Behind the same two tokens comes another third one each time."""

        def rule(history: Sequence[int]) -> int:
            return (2, 3, 4 + len(history) // 3)[len(history) % 3]

        scheduler = make(1, costs=COSTS, max_length=512, rule=rule)
        one, answer = request([2, 3, 4], tokens=260)
        scheduler.submit(one)
        run(scheduler)
        assert answer.tokens == alone([2, 3, 4], 260, rule)
        assert one.drafts > 0 and one.accepted == 0
        assert sum(kind == "extend" for kind, _ in scheduler.runner.calls) < 20

    def test_draws_are_the_same_with_and_without(self) -> None:
        texts = []
        for costs in (None, COSTS):
            scheduler = make(1, costs=costs, rule=repeating, max_length=256)
            options = SamplingOptions(do_sample=True, temperature=1.5, top_k=0, seed=3)
            one, answer = request([5, 6, 7, 8, 9], tokens=200, sampling=options)
            scheduler.submit(one)
            run(scheduler)
            texts.append(answer.tokens)
            assert costs is None or one.accepted > 20
        assert texts[0] == texts[1]

    def test_no_text_is_looked_through_where_no_guess_is_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """That takes longer than a call where most of a long prompt is in the slots already, and all texts wait."""
        looked: list[int] = []

        class Noting(NgramIndex):
            def extend(self, tokens: Iterable[int]) -> None:
                found = list(tokens)
                looked.append(len(found))
                super().extend(found)

        monkeypatch.setattr(scheduler_module, "NgramIndex", Noting)
        scheduler = make(2, costs=COSTS, rule=repeating)
        for name, tokens in (("a", 20), ("b", 23)):
            scheduler.submit(request([5, 6, 7, 8, 9], name=name, tokens=tokens)[0])
        while len(scheduler.decoding) != 1:
            scheduler.step()
            assert not looked
        run(scheduler)
        assert sum(looked) == 5 + 20, "all of the text that was left, once, when the first guess is made"

    def test_with_company_a_batch_is_used(self) -> None:
        scheduler = make(2, costs=COSTS, rule=repeating)
        for name in "ab":
            scheduler.submit(request([5, 6, 7, 8, 9], name=name, tokens=30)[0])
        run(scheduler)
        kinds = [kind for kind, _ in scheduler.runner.calls]
        assert "extend" not in kinds[: kinds.index("decode") + 1]
