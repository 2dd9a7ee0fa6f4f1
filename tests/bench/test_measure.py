"""What is inside of a timed section, by a clock that only the runner moves."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from doge_deploy.bench import measure
from doge_deploy.bench.measure import PREFILLS, time_first_calls, time_round
from doge_deploy.bench.workload import FILL_CHUNK, LEAD_IN_STEPS, Workload
from doge_deploy.runtime.base import FloatArray, IntArray, Runner

VOCAB = 11
RESET, PER_TOKEN = 1_000_000, 1


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class ClockedRunner(Runner):
    """Every call takes one tick per token and one per token that was there; reset takes a million."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(max_length=100_000, last_logits=True)
        self.clock = clock
        self.calls: list[tuple[int, int]] = []
        """Of each: tokens that the rows held, and tokens fed."""
        self.fed: list[IntArray] = []
        self.collected_garbage = False

    def _reset(self, batch_size: int) -> None:
        self.clock.now += RESET
        self.fed = []

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        held, width = int(self.row_lengths[0]), input_ids.shape[1]
        self.calls.append((held, width))
        self.fed.append(input_ids.copy())
        self.clock.now += PER_TOKEN * (held + width)
        self.collected_garbage |= gc.isenabled()
        logits = np.zeros((len(input_ids), 1, VOCAB), np.float32)
        logits[np.arange(len(input_ids)), 0, input_ids[:, -1]] = 1.0
        return logits

    def cache(self) -> dict[str, list[FloatArray]]:
        return {}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ClockedRunner:
    clock = Clock()
    monkeypatch.setattr(measure, "perf_counter_ns", clock)
    return ClockedRunner(clock)


def test_a_round_times_the_prompt_with_its_caches_and_each_step_alone(runner: ClockedRunner) -> None:
    workload = Workload(batch_size=2, past_length=0, prompt_length=10, decode_steps=3)
    times = time_round(runner, workload, workload.input_ids(VOCAB))
    assert times.prefill_ns == [RESET + 10] * PREFILLS
    assert times.decode_ns == [10 + LEAD_IN_STEPS + step for step in (1, 2, 3)] == list(workload.decode_lengths)


def test_nothing_of_a_warm_up_is_timed(runner: ClockedRunner) -> None:
    workload = Workload(1, 0, 10, 3)
    times = time_round(runner, workload, workload.input_ids(VOCAB))
    assert len(runner.calls) == 1 + PREFILLS + LEAD_IN_STEPS + 3
    assert len(times.prefill_ns) + len(times.decode_ns) == PREFILLS + 3


def test_a_past_is_filled_in_chunks_and_not_timed(runner: ClockedRunner) -> None:
    workload = Workload(1, FILL_CHUNK + 5, 10, 3)
    times = time_round(runner, workload, workload.input_ids(VOCAB))
    assert runner.calls[:3] == [(0, FILL_CHUNK), (FILL_CHUNK, 5), (FILL_CHUNK + 5, 10)]
    assert times.prefill_ns == [FILL_CHUNK + 5 + 10] * PREFILLS
    assert times.decode_ns == list(workload.decode_lengths)


def test_every_token_of_the_workload_is_fed_once_and_in_order(runner: ClockedRunner) -> None:
    workload = Workload(2, 3, 4, 2)
    ids = workload.input_ids(VOCAB)
    time_round(runner, workload, ids)
    np.testing.assert_array_equal(np.concatenate(runner.fed, axis=1), ids)


def test_first_calls_are_apart_and_tell_the_likeliest_tokens(runner: ClockedRunner) -> None:
    workload = Workload(2, 0, 4, 2)
    ids = workload.input_ids(VOCAB)
    first = time_first_calls(runner, workload, ids)
    assert (first.prefill_ns, first.decode_ns) == (RESET + 4, 5)
    assert first.tokens == ids[:, 3:].T.tolist(), "the runner's likeliest token is the one it was fed"


def test_no_garbage_is_collected_meanwhile_and_it_is_afterwards(runner: ClockedRunner) -> None:
    workload = Workload(1, 0, 4, 2)
    time_round(runner, workload, workload.input_ids(VOCAB))
    assert not runner.collected_garbage
    assert gc.isenabled()


def test_ids_are_the_same_for_everyone() -> None:
    workload = Workload(2, 3, 4, 2)
    ids = workload.input_ids(VOCAB)
    np.testing.assert_array_equal(ids, Workload(2, 3, 4, 2).input_ids(VOCAB))
    assert ids.shape == (2, workload.total_length) and ids.min() >= 0 and ids.max() < VOCAB
