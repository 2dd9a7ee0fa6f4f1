"""The timed sections.

A section is one `Runner.run`: from ids in NumPy to logits in NumPy. Choosing a token is left out, for everyone. The
prefill of an empty row includes making its caches. Python's garbage collector is off in a section, and the clock is
`perf_counter_ns`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from doge_deploy.bench.machine import NeighbourClock
from doge_deploy.bench.workload import FILL_CHUNK, LEAD_IN_STEPS, Workload
from doge_deploy.runtime.base import FloatArray, IntArray, Runner

PREFILLS = 3
"""Timed prefills of a round; an untimed one goes before them."""


@dataclass(frozen=True)
class FirstCalls:
    """The first calls of a runner: never averaged with later ones."""

    prefill_ns: int
    decode_ns: int
    tokens: list[list[int]]
    """Likeliest token after the prompt and after each decode step, one list of B ids per call."""


@dataclass(frozen=True)
class RoundTimes:
    """One round of one candidate."""

    prefill_ns: list[int]
    decode_ns: list[int]
    neighbours: float | None
    """Share of all CPUs that other processes and the hypervisor took meanwhile; None where that is not counted."""


@contextlib.contextmanager
def garbage_collection_off() -> Iterator[None]:
    """Collect now, and not again before the block ends."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_first_calls(runner: Runner, workload: Workload, input_ids: IntArray) -> FirstCalls:
    """Run the workload once. `input_ids` is `[B, T]`."""
    with garbage_collection_off():
        prefill_ns, logits = _timed_prefill(runner, workload, input_ids)
        tokens = [_likeliest(logits)]
        steps_ns = []
        for step_ids in _steps(workload, input_ids):
            start = perf_counter_ns()
            logits = runner.run(step_ids)
            steps_ns.append(perf_counter_ns() - start)
            tokens.append(_likeliest(logits))
    return FirstCalls(prefill_ns, steps_ns[0], tokens)


def time_round(runner: Runner, workload: Workload, input_ids: IntArray) -> RoundTimes:
    """One round: an untimed prefill, `PREFILLS` timed ones, `LEAD_IN_STEPS` untimed steps, the timed ones."""
    lead_in, timed = np.split(np.array(_steps(workload, input_ids)), [LEAD_IN_STEPS])
    with garbage_collection_off():
        neighbours = NeighbourClock()
        _timed_prefill(runner, workload, input_ids)
        prefill_ns = [_timed_prefill(runner, workload, input_ids)[0] for _ in range(PREFILLS)]
        for step_ids in lead_in:
            runner.run(step_ids)
        decode_ns = []
        for step_ids in timed:
            start = perf_counter_ns()
            runner.run(step_ids)
            decode_ns.append(perf_counter_ns() - start)
        share = neighbours.share()
    return RoundTimes(prefill_ns, decode_ns, share)


def _timed_prefill(runner: Runner, workload: Workload, input_ids: IntArray) -> tuple[int, FloatArray]:
    past, end = workload.past_length, workload.past_length + workload.prompt_length
    prompt = np.ascontiguousarray(input_ids[:, past:end])
    if past:
        runner.reset(workload.batch_size)
        for begin in range(0, past, FILL_CHUNK):
            runner.run(input_ids[:, begin : min(begin + FILL_CHUNK, past)])
        start = perf_counter_ns()
    else:
        start = perf_counter_ns()
        runner.reset(workload.batch_size)
    logits = runner.run(prompt)
    return perf_counter_ns() - start, logits


def _steps(workload: Workload, input_ids: IntArray) -> list[IntArray]:
    """The ids `[B, 1]` of each decode step, the untimed ones first; made before the clock starts."""
    first = workload.past_length + workload.prompt_length
    return [np.ascontiguousarray(input_ids[:, [place]]) for place in range(first, workload.total_length)]


def _likeliest(logits: FloatArray) -> list[int]:
    tokens: list[int] = logits[:, -1].argmax(axis=-1).tolist()
    return tokens
