"""What makes the reference cheaper changes no number: fewer rows of logits, whole texts, runs in other processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import shared_bundle

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.verify import ahead, live
from doge_deploy.verify.ahead import Ahead, workers_for
from doge_deploy.verify.cases import Case, chunk, exact_cases
from doge_deploy.verify.files import report_json
from doge_deploy.verify.live import LiveOracle
from doge_deploy.verify.reference_run import run_reference
from doge_deploy.verify.replay import Replay
from doge_deploy.verify.run import verify
from doge_deploy.verify.source import open_reference
from doge_deploy.verify.whole_texts import WholeTexts


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(shared_bundle("doge-tiny"))


@pytest.fixture(scope="module")
def oracle(bundle: Bundle) -> Iterator[LiveOracle]:
    with LiveOracle(bundle, open_reference(bundle, None)) as entered:
        yield entered


@pytest.mark.parametrize("last", [True, False], ids=["last", "all"])
def test_a_text_in_one_call_is_the_text_in_its_calls(oracle: LiveOracle, last: bool) -> None:
    """The slow twin of `WholeTexts`: every case of one row, call by call, to twelve digits."""
    replay = Replay("right", tokenwise=False, last_logits=last)
    texts, wider = oracle.references.texts, oracle.references.wider
    assert texts is not None
    compared, runs = 0, set()
    for case in exact_cases(oracle.limits, 0):
        asked = texts.asked(replay, case)
        if asked is None:
            continue
        runs.add(asked)
        found, slow = texts.run(asked, None).trace(case, last=last), run_reference(replay, wider, case)
        for name in slow.present:
            np.testing.assert_allclose(found.present[name][0], slow.present[name][0], rtol=0, atol=1e-12)
        for ours, theirs in zip(found.logits, slow.logits, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
        compared += 1
    assert (compared, len(runs)) == (5, 2), "prefill, decode and chunks share a text; w-1 and w another"


def test_what_calls_change_is_run_call_by_call(oracle: LiveOracle, bundle: Bundle) -> None:
    texts = oracle.references.texts
    assert texts is not None
    names = {case.name for case in exact_cases(oracle.limits, 0) if texts.asked(oracle_replay(), case) is None}
    assert names == {"batch of 2", "window K=w+1", "window K=2w", "window decode", "window chunk"}
    assert not WholeTexts.apply(oracle.references.same, oracle.limits), "its roundings are what is judged by"


def oracle_replay() -> Replay:
    return Replay("right", tokenwise=False, last_logits=True)


def test_a_mixture_is_run_call_by_call() -> None:
    bundle = open_bundle(shared_bundle("doge-tiny-moe"))
    with LiveOracle(bundle, open_reference(bundle, None)) as oracle:
        assert oracle.references.texts is None


def test_last_logits_are_those_of_a_run_with_all(oracle: LiveOracle) -> None:
    """To the bit: a product of fewer rows is another one, and has another error, only where it has very few."""
    ids = np.arange(3, 203) % 500
    case = Case("long", chunk([ids], [[150], [50]]), exact=True)
    few, every = (
        run_reference(Replay("right", tokenwise=False, last_logits=last), oracle.references.same, case)
        for last in (True, False)
    )
    assert [len(rows) for rows in few.logits] == [1, 1]
    assert all(np.array_equal(a[-1], b[-1]) for a, b in zip(few.logits, every.logits, strict=True))


def plain_report(path: Path, **options: Any) -> dict[str, Any]:
    report = report_json(verify(path, greedy_steps=8, **options))
    report.pop("environment")
    return json.loads(json.dumps(report))  # type: ignore[no-any-return]


def test_runs_in_other_processes_give_the_same_report(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = plain_report(bundle.path)
    taken = []
    take = Ahead.take

    def noted(self: Ahead, key: Any) -> Any:
        found = take(self, key)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(live, "SMALL_PARAMETERS", 0)
    monkeypatch.setattr(live, "workers_for", lambda run_bytes: 2)
    monkeypatch.setattr(Ahead, "take", noted)
    assert plain_report(bundle.path) == alone
    assert sum(taken) > 8


def test_tasks_are_made_once_and_taken_once() -> None:
    tasks = Ahead({"a": lambda: np.arange(3), "b": lambda: os.getpid(), "c": lambda: 3}, 2)
    try:
        assert tasks.take("c") == 3
        assert tasks.take("a").tolist() == [0, 1, 2]
        assert tasks.take("b") != os.getpid()
        assert tasks.take("a") is None and tasks.take("d") is None
    finally:
        tasks.close()


@pytest.mark.parametrize("end", [lambda: 1 / 0, lambda: os._exit(9)], ids=["raises", "dies"])
def test_what_fails_in_another_process_is_left_to_this_one(end: Any) -> None:
    tasks = Ahead({"bad": end, "good": lambda: 1}, 1)
    try:
        assert tasks.take("bad") is None
    finally:
        tasks.close()


def test_closing_ends_what_still_runs() -> None:
    tasks = Ahead({"long": lambda: __import__("time").sleep(600)}, 1)
    tasks.close()
    assert not any(process.is_alive() for process in tasks._processes)


def test_as_many_runs_at_once_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.sys, "platform", "linux")
    monkeypatch.setattr(ahead, "available_cpus", lambda: 8)
    monkeypatch.setattr(ahead, "available_memory", lambda: 10 << 30)
    assert [workers_for(size << 30) for size in (1, 2, 3)] == [4, 2, 0]
    monkeypatch.setattr(ahead, "available_cpus", lambda: 1)
    assert workers_for(1) == 0
