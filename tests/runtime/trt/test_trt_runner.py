"""The runner on a stand-in: the same numbers as ONNX Runtime's own runner, in place, and decode steps recorded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_stand_ins import DECODE, PREFILL, SHARED, axes, held_runner

from doge_deploy.bundle.engine_record import EngineProfile, EngineTensor
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.errors import UsageError
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.trt.in_ort import HostDevice, OrtEngine
from doge_deploy.runtime.trt.runner import TrtRunner, numbers


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def narrow_bundle() -> Bundle:
    """doge-tiny in fp16, logits of the last token: what is usually built."""
    from bundles import shared_bundle

    return open_bundle(shared_bundle("doge-tiny", dtype="fp16"))


def device_of(runner: TrtRunner) -> HostDevice:
    assert isinstance(runner.device, HostDevice)
    return runner.device


def engine_of(runner: TrtRunner) -> OrtEngine:
    assert isinstance(runner._engine, OrtEngine)
    return runner._engine


CALLS: dict[str, list[tuple[list[list[int]], list[int]]]] = {
    "prefill": [([[5, 6, 7, 8]], [4])],
    "decode": [([[5, 6, 7, 8]], [4]), *[([[token]], [1]) for token in (9, 10, 11, 12)]],
    "chunks": [([[5, 6, 7]], [3]), ([[8]], [1]), ([[9, 10, 11, 12]], [4]), ([[13]], [1]), ([[14]], [1])],
    "padded batch": [([[5, 6, 7], [8, 0, 0]], [3, 1]), ([[9], [10]], [1, 1]), ([[11], [12]], [1, 1])],
}


@pytest.mark.parametrize("profiles", [(PREFILL, DECODE), (SHARED,)], ids=["separate", "shared"])
@pytest.mark.parametrize("name", CALLS)
def testnumbers_and_caches_are_those_of_onnx_runtime(bundle: Bundle, name: str, profiles: Any) -> None:
    mine, theirs = held_runner(bundle, profiles=profiles), open_runner(bundle, "static", portable=True)
    for runner in (mine, theirs):
        runner.reset(len(CALLS[name][0][0]))
    for ids, lengths in CALLS[name]:
        got, expected = (runner.run(np.array(ids), lengths) for runner in (mine, theirs))
        for b, n in enumerate(lengths):
            np.testing.assert_array_equal(got[b, :n], expected[b, :n])
    found, wanted = mine.cache(), theirs.cache()
    assert found.keys() == wanted.keys()
    for present, rows in wanted.items():
        for got_row, row in zip(found[present], rows, strict=True):
            np.testing.assert_array_equal(got_row, row)


def test_fp16_with_logits_of_the_last_token(narrow_bundle: Bundle) -> None:
    mine, theirs = held_runner(narrow_bundle), open_runner(narrow_bundle, "static", portable=True)
    for runner in (mine, theirs):
        runner.reset(1)
    for ids, lengths in CALLS["chunks"]:
        got, expected = (runner.run(np.array(ids), lengths) for runner in (mine, theirs))
        assert got.dtype == np.float16 and got.shape == (1, 1, narrow_bundle.manifest.facts.vocab_size)
        np.testing.assert_array_equal(got, expected)


def test_the_memory_of_rope_goes_from_call_to_call(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Beyond the length that the angles were made for they depend on the longest text so far."""
    from bundles import make_bundle

    path = make_bundle("doge-tiny", tmp_path_factory.mktemp("long") / "doge-tiny", max_length=600, logits="last")
    long = open_bundle(path)
    profile = EngineProfile(name="shared", axes=axes((1, 1, 1), (1, 1, 600)))
    mine, theirs = held_runner(long, profiles=(profile,)), open_runner(long, "static", portable=True)
    assert mine.signature.remembers_rope
    rows = np.arange(530)[None] % 1000 + 3
    for runner in (mine, theirs):
        runner.reset(1)
    for part in (rows[:, :510], rows[:, 510:511], rows[:, 511:520], rows[:, 520:521], rows[:, 521:522]):
        np.testing.assert_array_equal(mine.run(part), theirs.run(part))
    for runner in (mine, theirs):
        runner.reset(1)
    np.testing.assert_array_equal(mine.run(rows[:, :20]), theirs.run(rows[:, :20]))


def test_the_runner_starts_anew_with_other_rows(bundle: Bundle) -> None:
    runner = held_runner(bundle)
    runner.reset(1)
    first = [runner.run(np.array([[token]])) for token in (5, 6, 7)]
    runner.reset(2)
    runner.run(np.array([[9, 9], [8, 8]]))
    runner.reset(1)
    again = [runner.run(np.array([[token]])) for token in (5, 6, 7)]
    np.testing.assert_array_equal(np.array(first), np.array(again))


def test_a_decode_step_is_recorded_once_and_then_launched(bundle: Bundle) -> None:
    runner = held_runner(bundle)
    runner.reset(1)
    runner.run(np.array([[5, 6, 7]]))
    for token in range(10, 16):
        runner.run(np.array([[token]]))
    device = device_of(runner)
    assert (device.recordings, device.launches) == (1, 5), "the first step runs as it is, and is recorded then"


def test_a_chunk_between_decode_steps_leaves_the_recording_valid(bundle: Bundle) -> None:
    runner = held_runner(bundle, profiles=(SHARED,))
    runner.reset(1)
    for ids in ([[5]], [[6]], [[7, 8, 9]], [[10]], [[11, 12]], [[13]]):
        runner.run(np.array(ids))
    assert device_of(runner).recordings == 1
    prefill, decode = engine_of(runner).contexts
    assert [shape for _, shape in decode.bindings] == [(1, 1)], "decoding is bound once"
    assert [shape for _, shape in prefill.bindings] == [(1, 3), (1, 2)]


def test_prefills_of_one_width_are_bound_once(bundle: Bundle) -> None:
    runner = held_runner(bundle)
    runner.reset(1)
    for _ in range(3):
        runner.run(np.array([[5, 6, 7]]))
    assert engine_of(runner).contexts[0].bindings == [(0, (1, 3))]


def test_each_context_runs_in_its_profile(bundle: Bundle) -> None:
    runner = held_runner(bundle)
    runner.reset(1)
    runner.run(np.array([[5, 6, 7]]))
    runner.run(np.array([[5]]))
    assert [context.bindings for context in engine_of(runner).contexts] == [[(0, (1, 3))], [(1, (1, 1))]]


def test_a_library_that_records_by_itself_is_left_to_it(bundle: Bundle) -> None:
    runner = held_runner(bundle, records_itself=True)
    runner.reset(1)
    for token in (5, 6, 7):
        runner.run(np.array([[token]]))
    assert device_of(runner).recordings == 0 and engine_of(runner).contexts[1].runs == 3


def test_caches_stay_where_they_are(bundle: Bundle) -> None:
    runner = held_runner(bundle)
    runner.reset(1)
    before = dict(runner.addresses)
    for ids in ([[5, 6]], [[7]], [[8]]):
        runner.run(np.array(ids))
    assert runner.addresses == before
    assert all(before[present] == before[past] for present, past in runner.plan.record.aliases.items())


def test_a_call_beyond_the_profiles_changes_nothing(bundle: Bundle) -> None:
    runner = held_runner(bundle, profiles=(DECODE,))
    runner.reset(1)
    runner.run(np.array([[5]]))
    with pytest.raises(UsageError, match="no profile takes 1 rows of 2 tokens"):
        runner.run(np.array([[6, 7]]))
    assert runner.row_lengths.tolist() == [1]
    assert runner.refusal(1, 2) and not runner.refusal(4, 1)


def test_bfloat16_is_read_as_the_number_that_it_is() -> None:
    tensor = EngineTensor(name="logits", dtype="bfloat16", shape=(4,))
    bits = np.array([0x3F80, 0xC000, 0x0000, 0x7F80], np.uint16)
    assert numbers(bits, tensor).tolist() == [1.0, -2.0, 0.0, float("inf")]


def test_what_is_returned_is_not_overwritten_by_the_next_step(bundle: Bundle) -> None:
    runner = held_runner(bundle)
    runner.reset(1)
    first = runner.run(np.array([[5]]))
    kept = first.copy()
    runner.run(np.array([[6]]))
    np.testing.assert_array_equal(first, kept)
