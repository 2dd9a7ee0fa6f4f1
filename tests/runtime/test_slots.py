"""Each slot gives what its text gives alone, whatever the others do."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import shared_bundle
from engine_stand_ins import axes, held_runner
from random_doge import DYNAMIC, LONGROPE, SMALL, SMALL_MOE, shared_doge
from slot_schedules import BEHIND, Edge, Findings, Schedule, batch_noise, graph_noise
from transformers import DogeForCausalLM

from doge_deploy.bundle.engine_record import EngineProfile
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.options.build import BuildOptions
from doge_deploy.runtime import cuda
from doge_deploy.runtime.ort import open_runner, runners, window
from doge_deploy.runtime.ort.window import WindowOrtRunner
from doge_deploy.runtime.rows import RowsRunner
from doge_deploy.runtime.slots import SlotRunner, open_slots
from doge_deploy.runtime.trt.bounded import BoundedTrtRunner
from doge_deploy.runtime.trt.lowered import open_lowered
from doge_deploy.verify.noise import Noise

SLOTS = 4
WIDE = {"head_dim": 16, "vocab_size": 256, "keep_window_size": 64}
"""Heads that the lowered graph takes, tokens enough for texts without repetitions, and no window."""

BEYOND = {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}
LONG = {**LONGROPE, "short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i / 2 for i in range(8)]}
"""Texts outgrow what their RoPE was made for."""

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "dense-all-logits": ({}, {"logits": "all"}),
    "window": ({"keep_window_size": 8}, {}),
    "window-all-logits": ({"keep_window_size": 12, "num_key_value_heads": 1}, {"logits": "all"}),
    "sliding": ({"sliding_window": 12}, {}),
    "moe": ({**SMALL_MOE, "keep_window_size": 64}, {"routing": "per-token"}),
    "moe-window": ({**SMALL_MOE, "keep_window_size": 8}, {"routing": "per-token", "logits": "all"}),
    "dynamic": (BEYOND, {"max_length": 64}),
    "dynamic-window-all-logits": ({**BEYOND, "keep_window_size": 8}, {"max_length": 64, "logits": "all"}),
    "longrope": ({"rope_parameters": LONG}, {"max_length": 64}),
    "int8": ({"hidden_size": 64, "intermediate_size": 64}, {"quantize": "int8"}),
}

CUDA_CONFIGS = ("dense-all-logits", "window", "dynamic")

PROFILES = (
    EngineProfile(name="prefill", axes=axes((1, 1, SLOTS), (1, 32, 64))),
    EngineProfile(name="decode", axes=axes((1, 1, SLOTS), (1, 1, 1))),
)

BACKENDS: dict[str, Callable[[Bundle], RowsRunner]] = {
    "ort": lambda bundle: open_runner(bundle, "static", threads=1),  # type: ignore[return-value]
    "ort-portable": lambda bundle: open_runner(bundle, "static", threads=1, portable=True),  # type: ignore[return-value]
    "engine": lambda bundle: held_runner(bundle, profiles=PROFILES),
    "cuda-on-cpu": lambda bundle: cuda.open_runner(bundle, bundle.layout("static"), device="cpu"),
}

BOUNDED = "bounded-engine"
"""The engine of a bundle whose cache can exceed the window; in pieces of 8 tokens where a call may be cut."""


def bounded_engine(bundle: Bundle) -> RowsRunner:
    most = 64 if bundle.manifest.whole_calls else 8
    options = BuildOptions.model_validate({"batch_size": [1, 1, SLOTS], "sequence_length": [1, most, most]})
    return open_lowered(bundle, bundle.layout("static"), options=options, threads=1)


OPENERS = {**BACKENDS, BOUNDED: bounded_engine}

CASES = [
    (config, backend)
    for config in CONFIGS
    for backend in BACKENDS
    if (config, backend) != ("int8", "engine") and (backend != "cuda-on-cpu" or config in CUDA_CONFIGS)
]
CASES += [(config, BOUNDED) for config in CONFIGS if "window" in config]
OFTEN = ("dense", "window", "moe-window", "sliding", "dynamic", "longrope", "int8")
"""Configurations of the usual run."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts drop keys often."""
    monkeypatch.setattr(window, "CHUNK", 8)
    monkeypatch.setattr(window, "SPARE", 3)


def checkpoint_of(config: str) -> Path:
    changes, _ = CONFIGS[config]
    return shared_doge(**{**SMALL, **WIDE, **changes, **{k: WIDE[k] for k in ("head_dim", "vocab_size")}})


def bundle_of(config: str) -> Bundle:
    return open_bundle(shared_bundle(checkpoint_of(config), **CONFIGS[config][1]))


@dataclass
class Opened:
    """A bundle in a backend: the runner of slots, one for texts alone, and what may differ."""

    rows: RowsRunner
    alone: RowsRunner
    noise: Noise
    edge: Edge | None


@cache
def opened(config: str, backend: str) -> Opened:
    bundle = bundle_of(config)
    rows, alone = OPENERS[backend](bundle), OPENERS[backend](bundle)
    facts = bundle.manifest.facts
    edge = None
    behind = 0 if facts.rope_changes(bundle.manifest.max_length) else BEHIND  # one row would decide the others' angles
    if facts.keep_window(bundle.manifest.max_length):
        edge = Edge(BACKENDS["ort-portable"](bundle), facts.keep_window_size, alone.vocab_size, behind=behind)
    if (config, backend) == ("int8", "ort"):
        noise = graph_noise(alone, BACKENDS["ort-portable"](bundle), alone.vocab_size)
    else:
        noise = batch_noise(alone, range(2, SLOTS + 1), alone.vocab_size, behind=behind)
    return Opened(rows, alone, noise, edge)


@pytest.fixture(scope="module", autouse=True)
def _close() -> Iterator[None]:
    yield
    opened.cache_clear()


def schedules(config: str, backend: str, seeds: range) -> Findings:
    case, findings = opened(config, backend), Findings()
    for seed in seeds:
        schedule = Schedule(SlotRunner(case.rows, SLOTS), case.alone, case.noise, seed, case.edge)
        findings.add(schedule.run())
        assert not findings.failures, (seed, findings.failures, schedule.log)
    print(f"\n{config} {backend}: {findings}")
    assert findings.tied_texts <= 1 + findings.texts // 100, "ties are rare where no token comes twice"
    return findings


@pytest.mark.parametrize(
    ("config", "backend"),
    [pytest.param(*case, id="-".join(case)) for case in CASES if case[0] in OFTEN],
)
def test_texts_are_those_of_a_run_alone(config: str, backend: str) -> None:
    findings = schedules(config, backend, range(3))
    assert findings.texts > 10 and findings.equal_bits > 0


@pytest.mark.sweep
@pytest.mark.parametrize(("config", "backend"), CASES, ids=["-".join(case) for case in CASES])
def test_two_hundred_schedules(config: str, backend: str) -> None:
    schedules(config, backend, range(200))


@pytest.mark.parametrize("backend", ["ort", BOUNDED])
def test_the_window_drops_keys_and_such_a_text_cannot_be_cut(backend: str) -> None:
    case = opened("window", backend)
    assert isinstance(case.rows, (WindowOrtRunner, BoundedTrtRunner))
    runner = SlotRunner(case.rows, SLOTS)
    slot, other = runner.acquire(), runner.acquire()
    ids = np.random.default_rng(0).permutation(runner.vocab_size)
    runner.prefill(slot, ids[:8])
    assert runner.can_cut(slot)
    runner.prefill(slot, ids[8:24])
    assert not runner.can_cut(slot)
    for cut in (lambda: runner.truncate(slot, 20), lambda: runner.copy(slot, other, 20)):
        with pytest.raises(UsageError, match="cannot be cut to 20 tokens: it dropped keys"):
            cut()
    runner.copy(slot, other, 24)  # all of it is exact
    runner.truncate(slot, 24)
    mine, theirs = (runner.decode([each], [int(ids[24])]).numpy() for each in (slot, other))
    np.testing.assert_array_equal(mine, theirs)
    runner.truncate(slot, 0)
    assert runner.length(slot) == 0 and runner.can_cut(slot)


# Mutation tests: what a wrong implementation would do, and that a few schedules find it.


def forget_scores(rows: RowsRunner) -> None:
    """A copy without the scores, which then weigh 0."""
    copy = rows._copy_row

    def wrong(source: int, target: int, tokens: int) -> None:
        copy(source, target, tokens)
        for name, buffer in rows._buffers.items():  # type: ignore[attr-defined]
            if name.endswith(".score"):
                buffer[target] = 0

    rows._copy_row = wrong  # type: ignore[method-assign]


def write_into_the_neighbour(rows: RowsRunner) -> None:
    run = rows._run_rows

    def wrong(first: int, input_ids: Any, lengths: Any) -> Any:
        result = run(first, input_ids, lengths)
        neighbour = first + len(input_ids)
        if neighbour < SLOTS:
            for buffer in rows._buffers.values():  # type: ignore[attr-defined]
                buffer[neighbour, :, 0] = buffer[neighbour - 1, :, 0]
        return result

    rows._run_rows = wrong  # type: ignore[method-assign]


def forget_to_move_a_buffer(rows: RowsRunner) -> None:
    swap = rows._swap_rows

    def wrong(a: int, b: int) -> None:
        swap(a, b)
        last = list(rows._buffers.values())[-1]  # type: ignore[attr-defined]
        last[[a, b]] = last[[b, a]]

    rows._swap_rows = wrong  # type: ignore[method-assign]


def give_logits_in_the_order_of_rows(rows: RowsRunner) -> None:
    run = rows._run_rows

    def wrong(first: int, input_ids: Any, lengths: Any) -> Any:
        logits = run(first, input_ids, lengths)
        logits.rows = lambda order: logits  # type: ignore[method-assign]
        return logits

    rows._run_rows = wrong  # type: ignore[method-assign]


def cut_one_token_too_few(rows: RowsRunner) -> None:
    truncate = rows.truncate_row
    rows.truncate_row = lambda row, tokens: truncate(row, min(tokens + 1, int(rows.row_lengths[row])))  # type: ignore[method-assign]


def copy_one_token_too_few(rows: RowsRunner) -> None:
    copy = rows._copy_row
    rows._copy_row = lambda source, target, tokens: copy(source, target, tokens - 1)  # type: ignore[method-assign]


def write_one_slot_late(rows: RowsRunner) -> None:
    """What chunked prefill would do with the wrong start."""
    run = rows._run_rows

    def wrong(first: int, input_ids: Any, lengths: Any) -> Any:
        before = rows.row_lengths
        late = (before > 0) & (before + input_ids.shape[1] < rows.max_length)
        try:
            rows.row_lengths = before + late
            return run(first, input_ids, lengths)
        finally:
            rows.row_lengths = before

    rows._run_rows = wrong  # type: ignore[method-assign]


def take_padding_for_text(rows: RowsRunner) -> None:
    """A shorter row of a call goes on behind its padding."""
    advance = rows._advance

    def wrong(first: int, lengths: Any) -> None:
        held = rows.row_lengths[first : first + len(lengths)]
        advance(first, np.where(held + lengths.max() <= rows.max_length, lengths.max(), lengths))

    rows._advance = wrong  # type: ignore[method-assign]


def forget_what_was_dropped(rows: RowsRunner) -> None:
    rows.has_dropped = lambda row: False  # type: ignore[method-assign]


def let_the_longest_decide(rows: RowsRunner) -> None:
    """The angles of a batch in transformers."""
    rows._alike = lambda first, lengths: [slice(0, len(lengths))]  # type: ignore[method-assign]


def remember_other_texts(rows: RowsRunner) -> None:
    rows._forget_rope = lambda: None  # type: ignore[method-assign]


FAULTS: dict[Callable[[RowsRunner], None], str] = {
    forget_scores: "dense",
    write_into_the_neighbour: "dense",
    forget_to_move_a_buffer: "dense",
    give_logits_in_the_order_of_rows: "dense",
    cut_one_token_too_few: "dense",
    copy_one_token_too_few: "dense",
    write_one_slot_late: "dense",
    take_padding_for_text: "dense",
    forget_what_was_dropped: "window",
    let_the_longest_decide: "dynamic",
    remember_other_texts: "dynamic",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_schedules_find_a_fault(fault: Callable[[RowsRunner], None]) -> None:
    case = opened(FAULTS[fault], "ort")
    rows = BACKENDS["ort"](bundle_of(FAULTS[fault]))
    fault(rows)
    findings = Findings()
    for seed in range(6):
        findings.add(Schedule(SlotRunner(rows, SLOTS), case.alone, case.noise, seed, case.edge).run())
    assert findings.failures


# What a released slot leaves.


def poison(rows: RowsRunner) -> None:
    """What a model that overflows leaves in every row."""
    if isinstance(rows, cuda.CudaRunner):
        for cache in rows.caches.values():
            held = cache.read()
            held[:, :, : int(rows._written.max())] = np.inf
            cache.write(held)
    elif hasattr(rows, "_buffers"):
        for buffer in rows._buffers.values():
            buffer[:, :, : rows._written.max()] = np.inf  # type: ignore[attr-defined]
    else:
        for memory in rows._caches.values():  # type: ignore[attr-defined]
            memory.array.view(np.float32)[:] = np.inf


def released_and_acquired_again(config: str, backend: str, damage: Callable[[RowsRunner], None]) -> None:
    rows, alone = (OPENERS[backend](bundle_of(config)) for _ in range(2))
    damage(rows)
    runner = SlotRunner(rows, 2)
    slot = runner.acquire()
    ids = np.random.default_rng(0).permutation(runner.vocab_size)[:40]
    runner.prefill(slot, ids)
    poison(rows)
    runner.release(slot)
    again = runner.acquire()
    assert again == slot
    alone.reset(1)
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        expected = alone.run(ids[None, begin:end])
        np.testing.assert_array_equal(runner.prefill(again, ids[begin:end]).numpy(), expected)


@pytest.mark.parametrize(
    ("config", "backend"),
    [*itertools.product(["dense", "window", "sliding"], BACKENDS), ("window", BOUNDED)],
)
def test_a_slot_that_overflowed_is_clean_when_it_comes_back(config: str, backend: str) -> None:
    released_and_acquired_again(config, backend, lambda rows: None)


def test_infinity_that_is_left_in_a_slot_is_found() -> None:
    def keep(rows: RowsRunner) -> None:
        rows._clear_row = lambda row, kept: None  # type: ignore[method-assign]

    with pytest.raises(AssertionError):
        released_and_acquired_again("dense", "ort-portable", keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_cut_off_is_zero(backend: str) -> None:
    """The next call may write fewer tokens than were cut off."""
    rows, alone = (BACKENDS[backend](bundle_of("dense")) for _ in range(2))
    runner = SlotRunner(rows, 2)
    slot = runner.acquire()
    runner.prefill(slot, list(range(20)))
    kept = {name: arrays[0][:, :6].copy() for name, arrays in rows.cache().items()}
    poison(rows)
    runner.truncate(slot, 0)
    runner.prefill(slot, list(range(6)))
    for name, arrays in rows.cache().items():
        np.testing.assert_array_equal(arrays[0], kept[name])
    runner.truncate(slot, 3)
    alone.reset(1)
    alone.run(np.arange(6)[None], [3])
    np.testing.assert_array_equal(runner.decode([slot], [50]).numpy(), alone.run(np.array([[50]])))


def test_one_row_that_overflows_leaves_the_others_alone() -> None:
    case = opened("dense", "ort-portable")
    runner = SlotRunner(case.rows, 2)
    sick, well = runner.acquire(), runner.acquire()
    runner.prefill(sick, [1, 2, 3])
    before = runner.prefill(well, [4, 5, 6]).numpy()
    case.rows._buffers["present.0.value"][runner._row[sick], :, :3] = np.nan  # type: ignore[attr-defined]
    logits = runner.decode([sick, well], [7, 8])
    assert logits.argmax()[:, 0].tolist() == [-1, int(logits.numpy()[1, 0].argmax())]
    assert np.isfinite(logits.numpy()[1]).all() and np.isfinite(before).all()
    runner.release(sick)
    assert np.isfinite(runner.prefill(runner.acquire(), [1, 2, 3]).numpy()).all()


# What is computed, and where.


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefill_touches_its_own_row_only(backend: str) -> None:
    case = opened("dense", backend)
    runner = SlotRunner(case.rows, SLOTS)
    slots = [runner.acquire() for _ in range(SLOTS)]
    for slot in slots:
        runner.prefill(slot, [slot + 3] * 5)
    before = case.rows.cache()
    runner.prefill(slots[1], [9, 8, 7])
    for name, rows in case.rows.cache().items():
        for row, (mine, old) in enumerate(zip(rows, before[name], strict=True)):
            np.testing.assert_array_equal(mine[:, :5] if row == 1 else mine, old)


def test_a_step_computes_the_rows_that_are_asked_for() -> None:
    """Engines are told the rows of each call: one of a prefill, those of a step, at neighbouring places."""
    case = opened("dense", "engine")
    rows: Any = BACKENDS["engine"](bundle_of("dense"))
    runner = SlotRunner(rows, SLOTS)
    slots = [runner.acquire() for _ in range(SLOTS)]
    for slot in slots:
        runner.prefill(slot, [3, 4, 5])
    runner.decode(slots, [6] * 4)
    runner.release(slots[1])
    runner.decode([slots[3], slots[0]], [7, 8])  # rows 3 and 0: one has to move
    runner.decode([slots[0], slots[3]], [8, 9])
    bound = [shape for context in rows._engine.contexts for _, shape in context.bindings]
    assert bound == [(1, 3)] * 4 + [(4, 1), (2, 1)], "prefills one by one, four rows, then twice the same two"
    assert case.rows.vocab_size == runner.vocab_size


def test_slots_in_use_stay_together_without_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The free row between two slots is taken before one behind them."""
    case = opened("dense", "ort")
    runner = SlotRunner(case.rows, SLOTS)
    moved: list[tuple[int, int]] = []
    monkeypatch.setattr(case.rows, "swap_rows", lambda a, b: moved.append((a, b)))
    first, second, third = (runner.acquire() for _ in range(3))
    runner.release(second)
    assert runner.acquire() == second
    for slot in (first, second, third):
        runner.prefill(slot, [5, 6])
    runner.decode([third, first, second], [1, 2, 3])
    runner.decode([third, second], [1, 2])
    assert not moved


def test_the_shorter_text_moves() -> None:
    case = opened("dense", "ort")
    runner = SlotRunner(case.rows, 3)
    long, between, short = (runner.acquire() for _ in range(3))
    runner.prefill(long, list(range(30)))
    runner.prefill(between, [1, 2])
    runner.prefill(short, [3])
    runner.decode([long, short], [1, 2])
    assert [runner._row[slot] for slot in (long, between, short)] == [0, 2, 1]


@pytest.mark.parametrize("config", ["dense", "window", "sliding"])
def test_logits_of_more_tokens_than_are_computed_at_once(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of calls that are short enough."""
    monkeypatch.setattr(runners, "PIECE", 8)
    slots = SlotRunner(opened(config, "ort").rows, SLOTS)
    slot, ids = slots.acquire(), list(range(20, 47))
    pieces = [ids[at : at + 8] for at in range(0, len(ids), 8)]
    expected = np.concatenate([slots.extend([slot], [piece], len(piece)).numpy()[0].copy() for piece in pieces])
    for last in (len(ids), 20, 2):
        slots.truncate(slot, 0)
        found = slots.extend([slot], [ids], last).numpy()[0]
        assert slots.length(slot) == len(ids)
        np.testing.assert_array_equal(found, expected[-last:])


def test_memory_of_logits_that_became_too_small_is_let_go() -> None:
    """Each slot is bound for calls of its own, and scores a longer prompt than the one before."""
    rows = BACKENDS["ort"](bundle_of("dense-all-logits"))  # which no other test has given longer prompts
    slots, memories = SlotRunner(rows, SLOTS), []
    for length, slot in enumerate([slots.acquire() for _ in range(SLOTS)], 10):
        slots.extend([slot], [list(range(20, 20 + length))], length).numpy()
        memories.append(weakref.ref(rows._memory))  # type: ignore[attr-defined]
    assert len({id(one()) for one in memories if one() is not None}) == 1
    assert memories[-1]() is not None and memories[0]() is None


@pytest.mark.parametrize("before", [0, 5])
def test_an_emptied_slot_is_empty_whatever_a_failed_call_left(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = opened("window", "ort").rows
    slots = SlotRunner(rows, SLOTS)
    slot, ids = slots.acquire(), list(range(20, 50))
    expected = slots.prefill(slot, ids).numpy().copy()
    slots.truncate(slot, 0)
    if before:
        slots.prefill(slot, ids[:before])
    whole, calls = rows._run_part, itertools.count()  # type: ignore[attr-defined]

    def fail_later(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError
        return whole(*arguments)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(rows, "_run_part", fail_later)
        slots.prefill(slot, ids)
    assert slots.length(slot) == before
    slots.truncate(slot, 0)
    np.testing.assert_array_equal(slots.prefill(slot, ids).numpy(), expected)


def test_logits_are_read_before_the_next_call() -> None:
    for backend in BACKENDS:
        runner = SlotRunner(opened("dense", backend).rows, 2)
        slot = runner.acquire()
        first = runner.prefill(slot, [1, 2, 3])
        kept = first.numpy()
        copied = kept.copy()
        late = runner.decode([slot], [4])
        runner.decode([slot], [5])
        with pytest.raises(RuntimeError, match="overwritten by a later call"):
            late.numpy()
        np.testing.assert_array_equal(kept, copied)


def test_prompts_join_only_where_a_row_gets_what_it_gets_alone() -> None:
    def joins(config: str, backend: str, *lengths: int) -> bool:
        return SlotRunner(opened(config, backend).rows, SLOTS).joins(lengths)

    assert joins("dense", "ort", 30, 20, 10, 5) and joins("window", "ort", 30, 20)
    assert joins("moe", "ort-portable", 9, 5), "each token is routed by itself"
    assert not joins("dynamic", "ort", 9, 5) and not joins("longrope", "ort", 5, 5), "padding counts as text there"
    assert joins("dense", "engine", 30, 20) and not joins("dense", "engine", 30, 20, 10, 5, 5), "no profile has 5 rows"


def test_rows_that_would_be_short_calls_alone_are_no_long_call_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where long calls have a session of their own (no VNNI), it rounds otherwise than the other one."""
    rows: Any = opened("dense", "ort").rows
    runner = SlotRunner(rows, SLOTS)
    monkeypatch.setattr("doge_deploy.runtime.ort.runners.LONG_CALL", 32)
    assert runner.joins([20, 20])
    monkeypatch.setattr(rows, "_open_long", lambda: None)
    assert runner.joins([15, 15]) and runner.joins([33, 32]), "the same session together as alone"
    assert not runner.joins([20, 20]) and not runner.joins([33, 31])


# What is refused.

REFUSED: dict[str, tuple[Callable[[SlotRunner], object], str]] = {
    "none-free": (lambda r: [r.acquire() for _ in range(9)], "no slot is free: all 2 are in use"),
    "unknown": (lambda r: r.length(7), "slot 7 is not in use; in use: 0"),
    "released": (lambda r: (r.release(0), r.prefill(0, [1])), "slot 0 is not in use; in use: none"),
    "released-twice": (lambda r: (r.release(0), r.release(0)), "slot 0 is not in use"),
    "no-token": (lambda r: r.prefill(0, []), "slot 0 gets no token"),
    "no-list": (lambda r: r.prefill(0, np.array([[1, 2]])), "slot 0 gets no token; give a list"),
    "no-slot": (lambda r: r.decode([], []), "no slot is given"),
    "twice": (lambda r: r.decode([0, 0], [1, 2]), "slot 0 is given twice"),
    "fewer-tokens": (lambda r: r.decode([0], []), "1 slots and tokens for 0"),
    "negative-token": (lambda r: r.decode([0], [-1]), "token -1 for slot 0: must be 0 to 255"),
    "large-token": (lambda r: r.prefill(0, [3, 256]), "token 256 for slot 0: must be 0 to 255"),
    "too-long": (lambda r: r.prefill(0, [1] * 65), "slot 0 holds 0 tokens, and 65 more do not fit: max_length is 64"),
    "full": (lambda r: (r.prefill(0, [1] * 64), r.decode([0], [1])), "slot 0 holds 64 tokens, and 1 more do not fit"),
    "padding-too-long": (
        lambda r: (r.prefill(0, [1] * 63), r.extend([0, r.acquire()], [[1], [2, 3]])),
        "slot 0 holds 63 tokens, and 1 more in a call of 2 do not fit",
    ),
    "copy-to-itself": (lambda r: (r.prefill(0, [1, 2]), r.copy(0, 0, 1)), "slot 0 is given twice"),
    "copy-too-much": (lambda r: (r.prefill(0, [1, 2]), r.copy(0, r.acquire(), 3)), "slot 0 holds 2 tokens; 3 of them"),
    "copy-nothing": (lambda r: r.copy(0, r.acquire(), 0), "slot 0 holds 0 tokens; 0 of them cannot be copied"),
    "truncate-too-much": (lambda r: r.truncate(0, 1), "slot 0 holds 0 tokens, and cannot be cut to 1"),
    "truncate-negative": (lambda r: r.truncate(0, -1), "cannot be cut to -1"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_use_is_one_line_and_changes_nothing(call: Callable[[SlotRunner], object], message: str) -> None:
    runner = SlotRunner(opened("dense", "ort").rows, 2)
    runner.acquire()
    with pytest.raises(UsageError) as caught:
        call(runner)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_refused_call_leaves_the_slots_as_they_were() -> None:
    runner = SlotRunner(opened("dense", "ort").rows, 2)
    one, other = runner.acquire(), runner.acquire()
    runner.prefill(one, [1, 2, 3])
    with pytest.raises(UsageError):
        runner.decode([one, other, 5], [1, 2, 3])
    with pytest.raises(UsageError):
        runner.decode([one, other], [1, 999])
    assert (runner.length(one), runner.length(other)) == (3, 0)


def test_an_engine_that_was_built_for_fewer_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="no profile takes 5 rows of 1 tokens"):
        SlotRunner(opened("dense", "engine").rows, 5)
    narrow = SlotRunner(held_runner(bundle_of("dense"), profiles=PROFILES[1:]), 2)
    with pytest.raises(UsageError, match="no profile takes 1 rows of 2 tokens"):
        narrow.prefill(narrow.acquire(), [1, 2])


def test_a_mixture_whose_routing_mixes_rows_is_refused(tiny_moe_bundle: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"routes experts as transformers does.*or use one slot"):
        open_slots(open_bundle(tiny_moe_bundle), 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", ["dynamic", "dynamic-window-all-logits", "longrope"])
def test_beyond_its_length_each_slot_is_what_transformers_gives_it_alone(config: str, backend: str) -> None:
    """Four texts that outgrow 16 tokens at different steps; each call of a text is one of a model of its own."""
    checkpoint, rows = checkpoint_of(config), opened(config, backend).rows
    runner = SlotRunner(rows, SLOTS)
    texts = np.random.default_rng(3).permuted(np.tile(np.arange(256), (SLOTS, 1)), axis=1)
    slots = [runner.acquire() for _ in range(SLOTS)]
    models = [DogeForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval() for _ in slots]
    caches: list[Any] = [None] * SLOTS
    held = [0] * SLOTS

    def check(index: int, count: int, logits: np.ndarray[Any, Any]) -> None:
        ids = torch.from_numpy(texts[index, held[index] : held[index] + count][None])
        with torch.no_grad():
            output = models[index](ids, past_key_values=caches[index], use_cache=True)
        caches[index], held[index] = output.past_key_values, held[index] + count
        np.testing.assert_allclose(logits[-1], output.logits[0, -1].numpy(), rtol=0, atol=5e-5)

    for index, count in zip((0, 1, 3), (5, 13, 30), strict=True):
        check(index, count, runner.prefill(slots[index], texts[index, :count]).numpy()[0])
    for _ in range(18):
        running = [index for index in range(SLOTS) if held[index]]
        ids = [int(texts[index, held[index]]) for index in running]
        logits = runner.decode([slots[index] for index in running], ids).numpy()
        for row, index in enumerate(running):
            check(index, 1, logits[row])
        if held[0] == 12:  # a text in between, and beyond at once
            check(2, 20, runner.prefill(slots[2], texts[2, :20]).numpy()[0])
    assert held == [23, 31, 31, 48]


@pytest.mark.parametrize(("config", "beyond"), [("dynamic", [2, 1, 1]), ("longrope", [3, 1])])
def test_texts_share_a_call_where_their_angles_are_the_same(
    config: str, beyond: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the length all; beyond it those that end at the same place, or all where there are two sets of angles."""
    rows = opened(config, "ort").rows
    runner = SlotRunner(rows, SLOTS)
    slots = [runner.acquire() for _ in range(SLOTS)]
    run, counts = rows._run_rows, []

    def counting(first: int, ids: Any, lengths: Any) -> Any:
        counts.append(len(lengths))
        return run(first, ids, lengths)

    for slot, length in zip(slots, (14, 14, 3, 3), strict=True):
        runner.prefill(slot, list(range(length)))
    monkeypatch.setattr(rows, "_run_rows", counting)
    runner.decode(slots, [30] * 4)
    runner.truncate(slots[2], 0)
    runner.prefill(slots[2], list(range(20)))
    runner.decode(slots, [31] * 4)  # 16, 16, 21 and 5 tokens
    runner.decode(slots, [32] * 4)
    assert counts == [4, 1, 2, 1, 1, *beyond]


def test_the_growing_layout_is_refused(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    manifest = replace(bundle.manifest, layouts={"growing": bundle.layout("growing")})
    with pytest.raises(UnsupportedModelError, match=r"has the growing layout only.*--kv-cache static"):
        open_slots(replace(bundle, manifest=manifest), 2)


def test_one_slot_of_a_mixture_routes_as_the_reference(tiny_moe_bundle: Path) -> None:
    bundle = open_bundle(tiny_moe_bundle)
    runner, alone = open_slots(bundle, 1, threads=1), open_runner(bundle, threads=1)
    slot = runner.acquire()
    assert runner.whole_prompts and not runner.can_cut(slot)
    alone.reset(1)
    ids = np.arange(3, 23)
    np.testing.assert_array_equal(runner.prefill(slot, ids).numpy(), alone.run(ids[None]))
    np.testing.assert_array_equal(runner.decode([slot], [30]).numpy(), alone.run(np.array([[30]])))
    with pytest.raises(UsageError, match="takes a prompt in one call only"):
        runner.prefill(slot, [1, 2])
    with pytest.raises(UsageError, match="cannot be cut to 5 tokens: what its first tokens left depends"):
        runner.truncate(slot, 5)


def test_slots_must_be_some() -> None:
    with pytest.raises(UsageError, match="slots=0: must be at least 1"):
        open_slots(bundle_of("dense"), 0)
