"""Engines whose cache holds the window: the runner and both graphs on a stand-in.

Held against the standard graph in ONNX Runtime, which keeps every key and ranks all of them, and against transformers
in eager mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bundles import make_bundle, shared_bundle
from random_doge import DYNAMIC, SMALL, SMALL_MOE, random_doge, shared_doge
from sweeps import fixture_cases
from transformers import DogeForCausalLM

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.errors import UsageError
from doge_deploy.options.build import BuildOptions
from doge_deploy.runtime.base import FloatArray, IntArray, Runner
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.trt.bounded import BoundedTrtRunner
from doge_deploy.runtime.trt.in_ort import HostDevice, OrtEngine
from doge_deploy.runtime.trt.lowered import open_lowered
from doge_deploy.targets.trt.bounded import bodies

W, PIECE = 8, 5
BASE: dict[str, Any] = {**SMALL, "head_dim": 16, "vocab_size": 256}

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped-heads": ({}, {}),
    "one-kv-head": ({"num_key_value_heads": 1}, {"logits": "all"}),
    "kv-head-per-head": ({"num_key_value_heads": 4}, {}),
    "window-1": ({"keep_window_size": 1}, {}),
    "window-5": ({"keep_window_size": 5}, {}),
    "window-3": ({"keep_window_size": 3}, {"logits": "all"}),
    "moe-reference": ({**SMALL_MOE, "head_dim": 16}, {}),
    "moe-per-token": ({**SMALL_MOE, "head_dim": 16}, {"routing": "per-token"}),
    "dynamic": ({"max_position_embeddings": 16, "rope_parameters": DYNAMIC}, {"max_length": 64}),
    "fp16": ({}, {"dtype": "fp16"}),
}
ALWAYS = ["grouped-heads", "one-kv-head", "window-1", "window-3", "moe-reference", "dynamic"]


def small_bundle(changes: dict[str, Any], options: dict[str, Any]) -> Bundle:
    config = {**BASE, **changes, "vocab_size": 256}
    return open_bundle(shared_bundle(shared_doge(**config), **options))


def opened(bundle: Bundle, piece: int = PIECE, *, rows: int = 3, **options: Any) -> BoundedTrtRunner:
    """The runner with a prefill of at most `piece` tokens; of any length that fits where calls stay whole."""
    most = 64 if bundle.manifest.whole_calls else piece
    build = BuildOptions.model_validate({"batch_size": [1, 1, rows], "sequence_length": [1, most, most]})
    return open_lowered(bundle, bundle.layout("static"), options=build, threads=1, **options)


@pytest.fixture(scope="module", params=fixture_cases(CONFIGS, always=ALWAYS))
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return small_bundle(*request.param)


def replay(runner: Runner, calls: Sequence[Sequence[int]], rows: int = 2) -> list[FloatArray]:
    """Calls of some rows, each with the real tokens of a row; the logits of the last real ones."""
    ids = np.random.default_rng(0).permutation(256)[: 64 * rows].reshape(rows, 64)
    runner.reset(rows)
    done, logits = np.zeros(rows, int), []
    for lengths in calls:
        width = max(lengths)
        part = np.stack([np.resize(ids[b, done[b] : done[b] + n], width) for b, n in enumerate(lengths)])
        out = runner.run(part, list(lengths))
        logits.append(np.stack([out[b, n - 1 if out.shape[1] > 1 else 0] for b, n in enumerate(lengths)]))
        done += lengths
    return logits


CALLS = {
    "decode": [(4, 2)] + [(1, 1)] * 40,
    "one-token-first": [(1, 1)] * 30,
    "prefill-then-chunks": [(31, 17), (1, 1), (9, 2), (1, 1)],
    "uneven-rows": [(3, 12), (12, 3), (1, 1), (13, 13)],
    "a-row-that-ended": [(6, 1), (1, 11), (1, 1), (21, 1)],
}


@pytest.mark.parametrize("name", CALLS)
def test_the_standard_graph_agrees(bundle: Bundle, name: str) -> None:
    runner, standard = opened(bundle), open_runner(bundle, portable=True)
    tolerance = 4e-3 if bundle.manifest.dtype == "float16" else 4e-6
    for found, expected in zip(replay(runner, CALLS[name]), replay(standard, CALLS[name]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    positions, whole = runner.held_positions(), standard.cache()  # type: ignore[attr-defined]
    for present, rows in runner.cache().items():
        for row, all_of_it, held in zip(rows, whole[present], positions[int(present.split(".")[1])], strict=True):
            kept = np.take_along_axis(all_of_it, held[..., None], axis=1)
            np.testing.assert_allclose(row, kept, rtol=0, atol=2 * tolerance * np.abs(kept).max())


def test_what_the_cache_holds_are_the_best(bundle: Bundle) -> None:
    """As many as there are slots, each once, by the scores of the standard graph."""
    runner, standard = opened(bundle), open_runner(bundle, portable=True)
    replay(runner, CALLS["uneven-rows"])
    replay(standard, CALLS["uneven-rows"])
    for layer, rows in runner.held_positions().items():
        for held, best in zip(rows, kept_by_score(standard, layer, runner.window), strict=True):
            np.testing.assert_array_equal(held, best)


# Against transformers in eager mode.


@pytest.fixture(scope="module")
def dense() -> tuple[Bundle, Any]:
    checkpoint = shared_doge(**BASE)
    model = DogeForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    return open_bundle(shared_bundle(checkpoint)), model


def whole_text(model: Any, ids: IntArray) -> FloatArray:
    """Logits of every token `[T, V]`: what a token gets depends on those before it alone, in transformers too."""
    with torch.no_grad():
        logits: FloatArray = model(torch.from_numpy(ids[None])).logits[0].numpy()
    return logits


def pieces_of(length: int, how: str) -> list[int]:
    sizes = {"whole": length, "chunks": 3, "tokens": 1}[how]
    return [min(sizes, length - at) for at in range(0, length, sizes)]


@pytest.mark.parametrize("how", ["whole", "chunks", "tokens"])
@pytest.mark.parametrize("length", [W - 1, W, W + 1, 2 * W, 3 * W, 4 * W])
def test_prompts_of_any_length_then_decode(dense: tuple[Bundle, Any], length: int, how: str) -> None:
    bundle, model = dense
    ids = np.random.default_rng(length).permutation(256)[: length + 4]
    expected, runner = whole_text(model, ids), opened(bundle)
    runner.reset(1)
    at = 0
    for size in [*pieces_of(length, how), *[1] * 4]:
        found = runner.run(ids[None, at : at + size])[0, -1]
        at += size
        np.testing.assert_allclose(found, expected[at - 1], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_batch_with_padding(dense: tuple[Bundle, Any]) -> None:
    """Rows of very different length, each as transformers gives it alone."""
    bundle, model = dense
    lengths, steps = [3 * W, W - 1, W + 1], 2 * W
    texts = [np.random.default_rng(b).permutation(256)[: n + steps] for b, n in enumerate(lengths)]
    expected = [whole_text(model, text) for text in texts]
    runner = opened(bundle)
    runner.reset(3)
    padded = np.stack([np.resize(text[:n], max(lengths)) for text, n in zip(texts, lengths, strict=True)])
    found = [runner.run(padded, lengths)]
    for step in range(steps):
        found.append(runner.run(np.array([[text[n + step]] for text, n in zip(texts, lengths, strict=True)])))
    for call, logits in enumerate(found):
        for b, n in enumerate(lengths):
            wanted = expected[b][n - 1 + call]
            np.testing.assert_allclose(logits[b, -1], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_greedy_text_far_beyond_the_window(dense: tuple[Bundle, Any]) -> None:
    """By certificate: greedy text repeats tokens, whose scores tie exactly in the first layer."""
    from doge_deploy.verify.run import verify

    report = verify(dense[0].path, reference=str(shared_doge(**BASE)), greedy_steps=50, lowering=True)
    assert report.passed, report.failed_cases
    (greedy,) = (result for result in report.results if result.case == "greedy")
    assert greedy.top1.total > 4 * W
    assert "natural text" in {result.case for result in report.results}


# Ties.


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Every key scores 1, as in a model that was not trained."""
    folder = tmp_path_factory.mktemp("tied")
    model = random_doge(**BASE)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.zero_()
    model.save_pretrained(folder / "checkpoint")
    return open_bundle(make_bundle(folder / "checkpoint", folder / "bundle"))


@pytest.mark.parametrize("name", CALLS)
def test_of_equal_keys_the_earliest_stay(tied: Bundle, name: str) -> None:
    runner, standard = opened(tied), open_runner(tied, portable=True)
    for found, expected in zip(replay(runner, CALLS[name]), replay(standard, CALLS[name]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * np.abs(expected).max())
    for rows in runner.held_positions().values():
        for held in rows:
            np.testing.assert_array_equal(held, np.broadcast_to(np.arange(W), held.shape))


@pytest.mark.parametrize("how", ["whole", "chunks", "tokens"])
def test_equal_keys_among_others(dense: tuple[Bundle, Any], how: str) -> None:
    """Three tokens again and again: in the first layer a score depends on its token alone; later ones see no tie."""
    bundle, _ = dense
    runner, standard = opened(bundle), open_runner(bundle, portable=True)
    runner.reset(1), standard.reset(1)
    at = 0
    for size in pieces_of(len(FEW_TOKENS), how):
        runner.run(FEW_TOKENS[None, at : at + size])
        at += size
    standard.run(FEW_TOKENS[None])
    scores = standard.cache()["present.0.score"][0]  # type: ignore[attr-defined]
    assert len(np.unique(scores[0])) == 3
    np.testing.assert_array_equal(runner.held_positions()[0][0], kept_by_score(standard, 0, W)[0])


# The runner.


def engines_of(runner: BoundedTrtRunner) -> tuple[OrtEngine, OrtEngine]:
    assert runner._prefill is not None
    decode, prefill = runner._engine, runner._prefill[0]
    assert isinstance(decode, OrtEngine) and isinstance(prefill, OrtEngine)
    return decode, prefill


def test_one_token_is_decoded_in_place_and_recorded(dense: tuple[Bundle, Any]) -> None:
    runner = opened(dense[0])
    runner.reset(1)
    before = dict(runner.addresses)
    for ids in ([[5, 6, 7]], [[8]], [[9]], [[10, 11]], [[12]]):
        runner.run(np.array(ids))
    decode, prefill = engines_of(runner)
    device = runner.device
    assert isinstance(device, HostDevice) and (device.recordings, device.launches) == (1, 2)
    assert [shape for context in prefill.contexts for _, shape in context.bindings] == [(1, 3), (1, 2)]
    assert [shape for context in decode.contexts for _, shape in context.bindings] == [(1, 1)]
    assert runner.addresses == before, "a prefill is copied back; what is bound stays"


def test_memory_does_not_grow_with_the_text(dense: tuple[Bundle, Any]) -> None:
    """Device memory is what it was after the first calls, however long the text."""
    runner = opened(dense[0])
    device = runner.device
    assert isinstance(device, HostDevice)
    runner.reset(1)
    runner.run(np.arange(10)[None])
    runner.run(np.arange(1)[None])
    held = sum(memory.nbytes for memory in device._alive.values())
    for token in range(50):
        runner.run(np.array([[token]]))
    assert sum(memory.nbytes for memory in device._alive.values()) == held
    assert runner.plan.cache_bytes(1) == 2 * 2 * W * (2 * 16 + 2) * 4


def test_the_length_of_a_bundle_changes_no_size() -> None:
    """But that of the tables of angles."""
    plans = []
    for length in (64, 512):
        bundle = small_bundle({"max_position_embeddings": 512}, {"max_length": length})
        runner = opened(bundle)
        plans.append([(tensor.name, tensor.shape) for tensor in (*runner.plan.record.inputs, *runner.plan.outputs)])
    assert plans[0] == plans[1]


def test_a_call_that_may_not_be_cut_is_refused_where_it_is_too_long() -> None:
    bundle = small_bundle(*CONFIGS["moe-reference"])
    options = BuildOptions.model_validate({"sequence_length": [1, 4, 4]})
    runner = open_lowered(bundle, bundle.layout("static"), options=options)
    runner.reset(1)
    runner.run(np.arange(4)[None])
    with pytest.raises(UsageError, match=r"no profile takes 1 rows of 5 tokens; it was built for 1 row of 1 to 4"):
        runner.run(np.arange(5)[None])
    assert runner.row_lengths.tolist() == [4]


def test_an_engine_that_only_decodes() -> None:
    bundle = small_bundle({}, {})
    options = BuildOptions.model_validate({"sequence_length": 1})
    runner = open_lowered(bundle, bundle.layout("static"), options=options)
    standard = open_runner(bundle, portable=True)
    for found, expected in zip(replay(runner, [(1,)] * 30, 1), replay(standard, [(1,)] * 30, 1), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * np.abs(expected).max())
    assert "no profile takes 1 rows of 2 tokens" in str(runner.refusal(1, 2))


def test_a_prefill_leaves_other_rows_alone(dense: tuple[Bundle, Any]) -> None:
    runner = opened(dense[0])
    runner.reset(3)
    ids = np.random.default_rng(1).permutation(256)[:90].reshape(3, 30)
    runner.run(ids[:, :20])
    before = runner.cache()
    runner.run_rows(1, ids[1:2, 20:28], np.array([8]))
    for name, rows in runner.cache().items():
        for b in (0, 2):
            np.testing.assert_array_equal(rows[b], before[name][b])


# What a wrong implementation would do, and that it is found.

MUTATIONS: dict[str, tuple[str, str, str]] = {
    "the new key wins a tie": ("_DECODE", "Greater (new_score, worst)", "GreaterOrEqual (new_score, worst)"),
    "the earliest of the worst goes": (
        "_DECODE",
        "age_of_worst = Where (is_worst, old_age, youngest)",
        "earliness = Neg (old_age)\n    age_of_worst = Where (is_worst, earliness, youngest)",
    ),
    "the best goes": ("_DECODE", "worst = ReduceMin <", "worst = ReduceMax <"),
    "the old key is not written back": ("_DECODE", "Where (is_better, new_key, old_key)", "Identity (new_key)"),
    "the old value is not written back": ("_DECODE", "Where (is_better, new_value, old_value)", "Identity (new_value)"),
    "the old rank is not written back": ("_DECODE", "Where (is_better, new_rank, old_rank)", "Identity (new_rank)"),
    "positions are one off": ("_DECODE", "Add (row_position, one)", "Identity (row_position)"),
    "empty slots are seen": (
        "_DECODE",
        "Greater (row_kept_position, none)",
        "GreaterOrEqual (row_kept_position, none)",
    ),
    "in a prefill the earliest of equal keys goes": ("_PREFILL", "Greater (age, age_row)", "Less (age, age_row)"),
    "which slots may be emptied is chosen by score alone": (
        "_PREFILL",
        "tied_age = Where (is_tied, old_age, above_age)",
        "earliness = Neg (old_age)\n    tied_age = Where (is_tied, earliness, above_age)",
    ),
    "one key too many": ("_PREFILL", "Greater (count, token_floats)", "GreaterOrEqual (count, token_floats)"),
    "tokens see those after them": (
        "_PREFILL",
        "is_seen = LessOrEqual (seen_from, token_column)",
        "from_the_first = Mul (seen_from, zero)\n    is_seen = LessOrEqual (from_the_first, token_column)",
    ),
    "padding pushes keys out": ("_PREFILL", "Cast <to = 1> (row_length)", "Identity (end)"),
    "padding stays": ("_PREFILL", "staying_number = CumSum (", "staying_number = CumSum <reverse = 1> ("),
    "a slot that is not freed gets a key": (
        "_PREFILL",
        "Where (is_freed, new_place_number, chosen)",
        "Identity (chosen)",
    ),
    "a key keeps its place beside a new one": (
        "_PREFILL",
        "ScatterElements <axis = 2> (own_places, chosen, place)",
        "Identity (own_places)",
    ),
}


FEW_TOKENS = np.random.default_rng(4).integers(5, 8, 60)
"""Three tokens, whose scores tie in the first layer."""


def kept_by_score(standard: Any, layer: int, window: int) -> list[IntArray]:
    """The positions of the best keys by the scores that a standard graph holds, ties to the earliest, in order."""
    rows = standard.cache()[f"present.{layer}.score"]
    return [np.sort(np.argsort(-row[..., 0], axis=1, kind="stable")[:, :window], axis=1) for row in rows]


def is_wrong(bundle: Bundle, tied: Bundle) -> bool:
    """Whether logits, or what is held, differ from those of the standard graph: with different scores, with equal ones,
    and with a few that come again and again, where only the first layer is compared.
    """
    for one, name in itertools.product((bundle, tied), CALLS):
        runner, standard = opened(one), open_runner(one, portable=True)
        for found, expected in zip(replay(runner, CALLS[name]), replay(standard, CALLS[name]), strict=True):
            if not np.allclose(found, expected, rtol=0, atol=4e-6 * np.abs(expected).max()):
                return True
        for layer, rows in runner.held_positions().items():
            if not all(map(np.array_equal, rows, kept_by_score(standard, layer, W))):
                return True
    for how in ("chunks", "tokens"):
        runner, standard = opened(bundle), open_runner(bundle, portable=True)
        runner.reset(1), standard.reset(1)
        at = 0
        for size in pieces_of(len(FEW_TOKENS), how):
            runner.run(FEW_TOKENS[None, at : at + size])
            standard.run(FEW_TOKENS[None, at : at + size])
            at += size
            if not np.array_equal(runner.held_positions()[0][0], kept_by_score(standard, 0, W)[0]):
                return True
    return False


def test_nothing_is_found_where_nothing_is_wrong(dense: tuple[Bundle, Any], tied: Bundle) -> None:
    assert not is_wrong(dense[0], tied)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_found(name: str, dense: tuple[Bundle, Any], tied: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    where, old, new = MUTATIONS[name]
    text = getattr(bodies, where)
    assert text.count(old) == 1
    monkeypatch.setattr(bodies, where, text.replace(old, new))
    assert is_wrong(dense[0], tied)


def no_copy_back(runner: BoundedTrtRunner) -> None:
    runner.device.copy = lambda *arguments: None  # type: ignore[method-assign]


def copy_to_the_first_row(runner: BoundedTrtRunner) -> None:
    copy = runner.device.copy
    runner.device.copy = lambda source, begin, target, at, size: copy(source, begin, target, 0, size)  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [no_copy_back, copy_to_the_first_row], ids=lambda fault: fault.__name__)
def test_a_fault_of_the_runner_is_found(dense: tuple[Bundle, Any], fault: Any) -> None:
    runner, alone = opened(dense[0]), opened(dense[0])
    fault(runner)
    ids = np.random.default_rng(1).permutation(256)[:60].reshape(2, 30)
    runner.reset(2), alone.reset(1)
    for b in range(2):
        runner.run_rows(b, ids[b : b + 1, :20], np.array([20]))
    found = runner.run_rows(1, ids[1:2, 20:21], np.array([1])).numpy()
    alone.run(ids[1:2, :20])
    assert not np.allclose(found, alone.run(ids[1:2, 20:21]), atol=1e-5)
