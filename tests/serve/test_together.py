"""Prompts that wait together are fed together, where that is exact, within the budget, and to nobody's harm."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scripted_requests import Answer, alone, make, request, run
from scripted_slots import repeating

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.runtime.sampling import SamplingOptions
from doge_deploy.serve import prompts
from doge_deploy.serve.request import Request
from doge_deploy.serve.scheduler import Limits, Scheduler


def prompt(first: int, length: int) -> list[int]:
    """No two of them begin alike."""
    return [first, *range(2, 1 + length)]


def submit(scheduler: Scheduler, texts: Sequence[Sequence[int]], **changes: object) -> list[tuple[Request, Answer]]:
    made = [request(ids, name=f"r{number}", **{"tokens": 4, **changes}) for number, ids in enumerate(texts)]  # type: ignore[arg-type]
    for one, _ in made:
        scheduler.submit(one)
    return made


def streaming(scheduler: Scheduler, tokens: int = 40) -> Answer:
    """A text that is being made."""
    one, answer = request([90], name="stream", tokens=tokens)
    scheduler.submit(one)
    scheduler.step()
    scheduler.runner.calls.clear()
    return answer


def assert_each_is_alone(made: Sequence[tuple[Request, Answer]], tokens: int = 4) -> None:
    for one, answer in made:
        assert answer.tokens == alone(one.prompt_ids, tokens), one.id


@pytest.mark.parametrize("all_logits", [True, False])
def test_prompts_of_unequal_length_that_wait_are_one_call(all_logits: bool) -> None:
    scheduler = make(4, all_logits=all_logits)
    made = submit(scheduler, [prompt(50 + length, length) for length in (9, 3, 7)])
    scheduler.step()
    assert scheduler.runner.calls == [("together", (9, 3, 7))]
    run(scheduler)
    assert_each_is_alone(made)


def test_events_of_prompts_that_were_fed_together_go_out_together() -> None:
    scheduler = make(3)
    made, told = submit(scheduler, [prompt(50 + number, 3) for number in range(3)]), []
    scheduler.after_call = lambda: told.append([len(answer.tokens) for _, answer in made])
    scheduler.step()
    assert told == [[1, 1, 1]]


def test_the_budget_of_a_step_counts_padding() -> None:
    scheduler = make(6, limits=Limits(step_tokens=20))
    answer = streaming(scheduler)
    made = submit(scheduler, [prompt(50 + number, length) for number, length in enumerate((8, 4, 6, 5, 3))])
    scheduler.step()
    assert scheduler.runner.calls == [("decode", 1), ("together", (8, 4))], "three rows of 8 are 24, though 18 are real"
    scheduler.step()
    assert scheduler.runner.calls[2:] == [("decode", 3), ("together", (6, 5, 3))]
    run(scheduler)
    assert_each_is_alone(made)
    assert answer.tokens == alone([90], 40)


def test_where_nobody_waits_for_a_token_several_prompts_have_a_budget_of_their_own() -> None:
    scheduler = make(8, limits=Limits(step_tokens=8, alone_tokens=64, together_tokens=24))
    made = submit(scheduler, [prompt(50 + number, 8) for number in range(5)])
    scheduler.step()
    # the first three wait from then on, for one budget of a step
    assert scheduler.runner.calls == [("together", (8, 8, 8)), ("prefill", 8)]
    scheduler.step()
    assert scheduler.runner.calls[2:] == [("decode", 4), ("prefill", 8)]
    run(scheduler)
    assert_each_is_alone(made)


def test_a_step_delays_the_next_token_of_others_by_one_budget_whatever_is_fed_together() -> None:
    scheduler = make(8, limits=Limits(step_tokens=16), max_length=256)
    answer = streaming(scheduler, tokens=100)
    made = submit(scheduler, [prompt(20 + number, length) for number, length in enumerate((3, 70, 5, 8, 16, 2, 33))])
    while scheduler.prefilling or scheduler.waiting:
        scheduler.runner.calls.clear()
        before = len(answer.tokens)
        scheduler.step()
        assert len(answer.tokens) == before + 1
        fed = [count for kind, count in scheduler.runner.calls if kind != "decode"]
        assert sum(count if isinstance(count, int) else len(count) * max(count) for count in fed) <= 16
    run(scheduler)
    assert_each_is_alone(made)


def test_two_prompts_that_come_while_tokens_are_made_have_a_step_each() -> None:
    scheduler = make(6, max_length=128)
    answer = streaming(scheduler)
    made = submit(scheduler, [prompt(50, 40), prompt(51, 40)])
    scheduler.step()
    assert scheduler.runner.calls == [("decode", 1), ("prefill", 40)]
    scheduler.step()
    assert scheduler.runner.calls[2:] == [("decode", 2), ("prefill", 40)], "the first one's text ends a step earlier"
    run(scheduler)
    assert_each_is_alone(made)
    assert answer.tokens == alone([90], 40)


@pytest.mark.parametrize(
    ("others", "lengths", "calls"),
    [
        (True, (40, 40, 40), [("decode", 1), ("together", (40, 40, 40))]),
        (False, (40, 40), [("together", (40, 40))]),
        (True, (prompts.ALONE - 1,) * 2, [("decode", 1), ("together", (prompts.ALONE - 1,) * 2)]),
        (True, (40, 5), [("decode", 1), ("prefill", 40), ("prefill", 5)]),
    ],
)
def test_more_prompts_or_shorter_ones_or_before_any_token_share_a_step(
    others: bool, lengths: tuple[int, ...], calls: list[object]
) -> None:
    scheduler = make(6, max_length=128)
    if others:
        streaming(scheduler)
    made = submit(scheduler, [prompt(50 + number, length) for number, length in enumerate(lengths)])
    scheduler.step()
    assert scheduler.runner.calls == calls
    run(scheduler)
    assert_each_is_alone(made)


def test_the_oldest_prompt_is_fed_first_and_never_overtaken_for_long() -> None:
    scheduler = make(6, limits=Limits(step_tokens=20))
    streaming(scheduler)
    made = submit(scheduler, [prompt(50, 8), prompt(51, 18), prompt(52, 8), prompt(53, 8)])
    scheduler.step()
    assert scheduler.runner.calls == [("decode", 1), ("together", (8, 8))], "18 do not fit beside the oldest"
    scheduler.step()
    assert scheduler.runner.calls[2:] == [("decode", 3), ("prefill", 18)]
    run(scheduler)
    assert_each_is_alone(made)


def test_much_padding_is_not_worth_a_call() -> None:
    scheduler = make(3)
    long = 4 + prompts.PADDING
    made = submit(scheduler, [prompt(50, 4), prompt(51, long + 1), prompt(52, long)])
    scheduler.step()
    assert scheduler.runner.calls == [("together", (4, long)), ("prefill", long + 1)]
    run(scheduler)
    assert_each_is_alone(made)


def test_a_row_without_space_for_padding_is_fed_alone() -> None:
    scheduler = make(3, max_length=16)
    (first,) = submit(scheduler, [prompt(50, 12)], tokens=2)
    run(scheduler)
    turn = [*first[0].prompt_ids, *first[1].tokens[:1], 60, 61]  # 13 of its 15 tokens are held
    made = submit(scheduler, [turn, prompt(51, 4)], tokens=1)
    scheduler.step()
    assert scheduler.runner.calls[2:] == [("prefill", 2), ("prefill", 4)], "13 and 4 are more than 16"
    run(scheduler)
    assert_each_is_alone(made, 1)


def test_what_two_prompts_share_is_computed_once() -> None:
    scheduler = make(4)
    system = list(range(2, 42))
    made = submit(scheduler, [[*system, 60], [*system, 70, 71], prompt(50, 41), [*system, 80]])
    scheduler.step()
    assert scheduler.runner.calls == [("together", (41, 41)), ("together", (2, 1))]
    run(scheduler)
    assert_each_is_alone(made)
    assert [answer.cached for _, answer in made] == [0, 40, 0, 40]


def test_a_short_beginning_that_two_prompts_share_does_not_part_them() -> None:
    scheduler = make(2, max_length=128)
    system = list(range(2, 22))
    made = submit(scheduler, [[*system, *range(30, 60)], [*system, *range(60, 90)]])
    scheduler.step()
    assert scheduler.runner.calls == [("together", (50, 50))]
    run(scheduler)
    assert_each_is_alone(made)


def test_prompts_with_prefix_hits_are_fed_together() -> None:
    scheduler = make(4, max_length=128)
    for first in (50, 51, 52):
        submit(scheduler, [prompt(first, 30)], tokens=2)
        run(scheduler)
    scheduler.runner.calls.clear()
    made = submit(
        scheduler, [[*prompt(first, 30), *range(60, 60 + more)] for first, more in ((51, 5), (50, 7), (52, 2))]
    )
    scheduler.step()
    assert scheduler.runner.calls == [("together", (5, 7, 2))]
    run(scheduler)
    assert_each_is_alone(made)
    assert [answer.cached for _, answer in made] == [30, 30, 30]


def test_the_last_piece_of_a_long_prompt_is_fed_with_short_ones() -> None:
    scheduler = make(4, limits=Limits(step_tokens=16), max_length=128)
    streaming(scheduler)
    made = submit(scheduler, [prompt(50, 38), prompt(51, 5), prompt(52, 4)])
    for _ in range(3):
        scheduler.step()
    fed = [call for call in scheduler.runner.calls if call[0] != "decode"]
    assert fed == [("prefill", 16), ("prefill", 16), ("together", (6, 5)), ("prefill", 4)]
    run(scheduler)
    assert_each_is_alone(made)


@pytest.mark.parametrize("joins", [1, 2])
def test_no_more_rows_are_fed_than_the_runner_takes(joins: int) -> None:
    scheduler = make(4, joins=joins)
    made = submit(scheduler, [prompt(50 + number, 5) for number in range(4)])
    run(scheduler)
    assert_each_is_alone(made)
    widest = [count for kind, count in scheduler.runner.calls if kind == "together"]
    assert all(len(count) == joins for count in widest) and bool(widest) == (joins > 1)


def test_prompts_that_must_come_whole_are_fed_alone() -> None:
    scheduler = make(3)
    scheduler.runner.whole_prompts = True
    made = submit(scheduler, [prompt(50 + number, 5) for number in range(3)])
    run(scheduler)
    assert_each_is_alone(made)
    assert not any(kind == "together" for kind, _ in scheduler.runner.calls)


def test_a_prompt_that_is_scored_is_fed_alone() -> None:
    scheduler = make(4)
    scored, answer = request(prompt(50, 5), name="scored", tokens=0, logprobs=0, score_prompt=True)
    first, *_ = submit(scheduler, [prompt(51, 5)])
    scheduler.submit(scored)
    last, *_ = submit(scheduler, [prompt(52, 5)])
    scheduler.step()
    assert scheduler.runner.calls == [("together", (5, 5)), ("extend", 5)]
    run(scheduler)
    assert_each_is_alone([first, last])
    assert len(scored.prompt_scores) == 5 and answer.finished.reason == "length"


def test_nan_in_one_row_of_a_call_fails_that_request_alone() -> None:
    scheduler = make(3)
    scheduler.runner.nan_after.add(tuple(prompt(51, 6)))
    good, bad, other = submit(scheduler, [prompt(50, 5), prompt(51, 6), prompt(52, 4)])
    scheduler.step()
    assert scheduler.runner.calls == [("together", (5, 6, 4))]
    run(scheduler)
    assert_each_is_alone([good, other])
    assert isinstance(bad[1].finished.error, UnsupportedModelError) and bad[1].tokens == []
    assert [] in scheduler.runner.rows.values()


def test_an_error_of_a_call_fails_the_request_alone_that_causes_it() -> None:
    scheduler = make(3)
    rows = scheduler.runner
    whole, single = rows.extend, rows.prefill

    def refuse_51(ids: Sequence[Sequence[int]]) -> None:
        if any(each[0] == 51 for each in ids):
            raise RuntimeError("51")

    def extend(slots: Sequence[int], ids: Sequence[Sequence[int]], last: int = 1) -> object:
        refuse_51(ids)
        return whole(slots, ids, last)

    def prefill(slot: int, ids: Sequence[int]) -> object:
        refuse_51([ids])
        return single(slot, ids)

    rows.extend, rows.prefill = extend, prefill
    good, bad, other = submit(scheduler, [prompt(50, 5), prompt(51, 6), prompt(52, 4)])
    run(scheduler)
    assert_each_is_alone([good, other])
    assert str(bad[1].finished.error) == "51"


@pytest.mark.parametrize("cuts", [True, False])
def test_rows_that_a_failed_call_has_changed_already_are_fed_from_the_start(cuts: bool) -> None:
    """If a device fails while logits are read, or memory ends in the middle of a call, the rows hold the tokens."""
    scheduler = make(3, limits=Limits(alone_tokens=30), max_length=128, cuts=cuts)
    rows = scheduler.runner
    whole, failed = rows.extend, []

    def extend(slots: Sequence[int], ids: Sequence[Sequence[int]], last: int = 1) -> object:
        found = whole(slots, ids, last)
        if len(slots) > 1 and not failed:
            failed.append(slots)
            raise MemoryError
        return found

    rows.extend = extend
    made = submit(scheduler, [prompt(50, 40), prompt(51, 6), prompt(52, 4)])  # the first comes in two pieces
    run(scheduler)
    assert failed
    assert_each_is_alone(made)
    kinds = [kind for kind, _ in rows.calls]
    assert kinds.count("together") == 1, "they are not tried together again"


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_a_cancellation_while_prompts_are_fed_touches_no_other(leaving: int) -> None:
    scheduler = make(4, limits=Limits(step_tokens=12), max_length=128)
    answer = streaming(scheduler)
    made = submit(scheduler, [prompt(50, 30), prompt(51, 5), prompt(52, 4)])
    scheduler.step()
    scheduler.cancel(f"r{leaving}")
    assert made[leaving][1].finished.reason == "cancelled" and len(scheduler.table.free()) == 1
    late = request(prompt(53, 7), name="late", tokens=4)
    scheduler.submit(late[0])
    scheduler.step()
    assert late[0].slot is not None
    run(scheduler)
    assert_each_is_alone([one for one in made if one is not made[leaving]] + [late])
    assert answer.tokens == alone([90], 40)


def test_guesses_stop_while_prompts_are_fed_and_go_on_behind_them() -> None:
    scheduler = make(4, costs={1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4}, rule=repeating, max_length=256)
    one, answer = request([5, 6, 7, 8, 9], name="stream", tokens=100)
    scheduler.submit(one)
    for _ in range(6):
        scheduler.step()
    assert scheduler.runner.calls[-1][0] == "extend"
    scheduler.runner.calls.clear()
    made = submit(scheduler, [[20 + number, 21, 22, 23, 24] for number in range(3)], tokens=2)
    run(scheduler)
    kinds = [kind for kind, _ in scheduler.runner.calls]
    assert kinds[:3] == ["decode", "together", "decode"] and kinds[3] == "extend"
    assert answer.tokens == alone([5, 6, 7, 8, 9], 100, repeating)
    for asked, found in made:
        assert found.tokens == alone(asked.prompt_ids, 2, repeating)


def test_draws_do_not_depend_on_what_was_fed_together() -> None:
    texts = []
    for joins in (1, 99):
        scheduler = make(3, joins=joins)
        options = SamplingOptions(do_sample=True, temperature=1.5, top_k=0, seed=3)
        made = submit(scheduler, [prompt(50 + number, 5 + number) for number in range(3)], sampling=options, tokens=20)
        run(scheduler)
        texts.append([answer.tokens for _, answer in made])
    assert texts[0] == texts[1]
