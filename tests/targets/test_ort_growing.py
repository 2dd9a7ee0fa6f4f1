"""The lowered growing graph computes what the standard one does, with tensors handed on and in buffers alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from bundles import broken_copy, make_bundle
from random_doge import SMALL, SMALL_MOE, save_random_doge
from sweeps import fixture_cases

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.graph.schemas import DYNAMIC_MASK_ATTENTION
from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.ort import GrowingOrtRunner, OrtRunner, growing, open_runner, open_session
from doge_deploy.runtime.ort.growing import InPlaceGrowingOrtRunner
from doge_deploy.targets.ort.lower import GROWING_PASSES, lower
from doge_deploy.verify.run import verify

SLOTS = 8
"""Of the first buffers, so that short texts outgrow them."""

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped-heads": ({}, {}),
    "all-keys": ({"keep_window_size": 64}, {}),
    "one-kv-head": ({"num_key_value_heads": 1, "keep_window_size": 64}, {"logits": "all"}),
    "one-kv-head-window": ({"num_key_value_heads": 1}, {}),
    "kv-head-per-head": ({"num_key_value_heads": 4, "keep_window_size": 64}, {}),
    "untied-biases": (
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "keep_window_size": 64},
        {},
    ),
    "moe-per-token": (SMALL_MOE, {"routing": "per-token"}),
}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "FIRST_SLOTS", SLOTS)


@pytest.fixture(scope="module", params=fixture_cases(CONFIGS, always=["grouped-heads", "one-kv-head", "moe-per-token"]))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config, options = request.param
    path = tmp_path_factory.mktemp("growing")
    checkpoint = save_random_doge(path / "checkpoint", **{**SMALL, "head_dim": 16, **config, "vocab_size": 256})
    return open_bundle(make_bundle(checkpoint, path / "bundle", kv_cache=("growing",), **options))


def replay(runner: OrtRunner) -> tuple[list[FloatArray], dict[str, list[FloatArray]]]:
    """Prefill, a chunk and decode steps of two rows of different length: logits and the caches at the end."""
    ids = np.random.default_rng(0).integers(3, 256, (2, 64))
    runner.reset(2)
    logits, done = [], 0
    for width, lengths in ((7, [7, 4]), (1, [1, 1]), (5, [5, 3]), *[(1, [1, 1])] * 8, (3, [1, 3]), (1, [1, 1])):
        out = runner.run(ids[:, done : done + width], lengths)
        logits += [row[:n] if out.shape[1] > 1 else row for row, n in zip(out, lengths, strict=True)]
        done += width
    return logits, runner.cache()


def assert_same(found: tuple[Any, dict[str, Any]], expected: tuple[Any, dict[str, Any]]) -> None:
    """All numbers equal up to the rounding of float32 sums."""
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=4e-6 * np.abs(other).max())
    assert list(found[1]) == list(expected[1])
    for name, rows in expected[1].items():
        for one, other in zip(found[1][name], rows, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=4e-6 * max(1, np.abs(other).max()))


def test_the_standard_graph_agrees(bundle: Bundle) -> None:
    runner = open_runner(bundle, threads=1)
    assert isinstance(runner, InPlaceGrowingOrtRunner)
    expected = replay(open_runner(bundle, portable=True, threads=1))
    assert_same(replay(runner), expected)
    assert_same(replay(runner), expected)  # in the buffers that the first text left


def test_tensors_that_are_handed_on_give_the_same(bundle: Bundle) -> None:
    """As optimum runs the graph: the reference of the runner in place."""
    session = open_session(bundle.path / "model.ort.onnx", bundle.path, threads=1)
    manifest = bundle.manifest
    handing = GrowingOrtRunner(
        session, bundle.layout(), max_length=manifest.max_length, last=manifest.options.logits == "last"
    )
    assert_same(replay(open_runner(bundle, threads=1)), replay(handing))


def test_what_runs_is_the_lowered_graph_and_verifies(bundle: Bundle) -> None:
    report = verify(bundle.path, reference=str(bundle.path.parent / "checkpoint"), greedy_steps=8)
    assert report.graphs == {"growing": "model.ort.onnx"}
    assert report.passed, [(result.case, result.failures) for result in report.results]


def test_attention_is_one_operator(bundle: Bundle) -> None:
    kinds = [node.op_type for node in ir.load(bundle.path / "model.ort.onnx").graph]
    assert kinds.count("GroupQueryAttention") == SMALL["num_hidden_layers"]
    assert not {"TopK", "DynamicMaskAttention", "RotaryEmbedding"} & set(kinds)
    record = bundle.layout().lowered.get("ort")
    assert record is not None and record.shares_buffers and record.requires == "1.32" and not record.declined


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("dense")
    config = {**SMALL, "head_dim": 16, "vocab_size": 256, "keep_window_size": 64}
    checkpoint = save_random_doge(path / "checkpoint", **config)
    return open_bundle(make_bundle(checkpoint, path / "bundle", kv_cache=("growing",)))


def forget_score(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "GroupQueryAttention").replace_input_with(10, None)


def forget_past_score(model: ir.Model) -> None:
    """The score of every past key becomes that of an empty state."""
    product = next(node for node in model.graph if (node.outputs[0].name or "").endswith("past_products"))
    zero = ir.node("Sub", [product.outputs[0], product.outputs[0]])
    product.outputs[0].replace_all_uses_with(zero.outputs[0])
    for index in range(2):
        zero.replace_input_with(index, product.outputs[0])
    model.graph.insert_after(product, zero)


def show_padding(model: ir.Model) -> None:
    """Every key may be seen, padding too."""
    node = next(node for node in model.graph if node.op_type == "Not")
    everything = ir.node("Or", [node.outputs[0], node.inputs[0]])
    node.outputs[0].replace_all_uses_with(everything.outputs[0])
    everything.replace_input_with(0, node.outputs[0])
    model.graph.insert_after(node, everything)


@pytest.mark.parametrize("fault", [forget_score, forget_past_score, show_padding])
def test_verify_finds_a_broken_graph(
    fault: Callable[[ir.Model], None], dense: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = broken_copy(dense.path, tmp_path_factory.mktemp("broken") / "b", graph=fault)
    reference = ["--reference", str(dense.path.parent / "checkpoint"), "--greedy-steps", "4"]
    assert run_command(["verify", str(broken), *reference]) == 1
    assert run_command(["verify", str(broken), *reference, "--portable"]) == 0


def add_attribute(node: ir.Node) -> None:
    node.attributes["sliding_window"] = ir.AttrInt64("sliding_window", 8)


def keep_few(node: ir.Node) -> None:
    node.attributes["keep_window_size"] = ir.AttrInt64("keep_window_size", 8)


def drop_mask(node: ir.Node) -> None:
    node.resize_inputs(5)


def another(index: int) -> Callable[[ir.Node], None]:
    """An input that comes through one more node."""

    def change(node: ir.Node) -> None:
        shifted = ir.node("Identity", [node.inputs[index]])
        assert isinstance(node.graph, ir.Graph)
        node.graph.insert_before(node, shifted)
        node.replace_input_with(index, shifted.outputs[0])

    return change


UNKNOWN = {
    "a-sliding-window": (add_attribute, "sliding_window"),
    "windows-that-differ": (keep_few, "different numbers of keys"),
    "no-mask": (drop_mask, "5 inputs"),
    "another-key": (another(1), "the key comes from Identity"),
    "another-score": (another(3), "the score comes from Identity"),
    "another-first-slot": (another(4), "the first slot comes from Identity"),
    "another-mask": (another(5), "the mask of keys is computed otherwise"),
}


@pytest.mark.parametrize(("change", "words"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_attention_declines_what_it_does_not_know(change: Callable[[ir.Node], None], words: str, dense: Bundle) -> None:
    model = ir.load(dense.path / "model.onnx")
    change([node for node in model.graph if node.op_type == DYNAMIC_MASK_ATTENTION][-1])
    before = [(node.op_type, [v and v.name for v in node.inputs]) for node in model.graph]
    result = lower(model, [make for make in GROWING_PASSES if make.__name__ == "FuseGrowingAttentionPass"])
    assert not result.applied and not result.shares_buffers
    assert words in result.declined["FuseGrowingAttentionPass"]
    assert [(node.op_type, [v and v.name for v in node.inputs]) for node in result.model.graph] == before


def test_padding_of_a_mixture_as_in_the_reference_stays(tmp_path: Path) -> None:
    config = {**SMALL, **SMALL_MOE, "head_dim": 16, "vocab_size": 256}
    checkpoint = save_random_doge(tmp_path / "checkpoint", **config)
    bundle = open_bundle(make_bundle(checkpoint, tmp_path / "b", kv_cache=("growing",)))
    record = bundle.layout().lowered["ort"]
    assert "mixes padding" in record.declined["FuseGrowingAttentionPass"]
    assert "RoutedExpertsPass" in record.applied and not record.shares_buffers
    assert_same(replay(open_runner(bundle, threads=1)), replay(open_runner(bundle, portable=True, threads=1)))
    assert verify(bundle.path, reference=str(checkpoint), greedy_steps=8).passed


def test_without_the_fused_attention_tensors_are_handed_on(dense: Bundle) -> None:
    passes = [make for make in GROWING_PASSES if make.__name__ != "FuseGrowingAttentionPass"]
    result = lower(ir.load(dense.path / "model.onnx"), passes)
    assert result.applied and not result.shares_buffers and result.requires == ""
    runner = open_runner(dense, model=ir.to_proto(result.model).SerializeToString(), threads=1)
    assert type(runner) is GrowingOrtRunner
    assert_same(replay(runner), replay(open_runner(dense, portable=True, threads=1)))


@pytest.mark.parametrize("quantize", ["int8", pytest.param("int4", marks=pytest.mark.sweep)])
def test_quantized_weights_are_read_as_they_are_stored(quantize: str, tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle("doge-tiny", tmp_path / "b", kv_cache=("growing",), quantize=quantize))
    kinds = {node.op_type for node in ir.load(bundle.path / "model.ort.onnx").graph}
    assert "MatMulNBits" in kinds and not {"DequantizeLinear", "Attention"} & kinds
    report = verify(bundle.path, greedy_steps=8)
    assert report.graphs == {"growing": "model.ort.onnx"} and report.passed
