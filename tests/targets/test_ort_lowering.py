"""Each pass changes nothing beyond rounding, and declines what it does not know."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from bundles import broken_copy, make_bundle
from random_doge import SMALL, SMALL_MOE, save_random_doge

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.cli.main import run_command
from doge_deploy.graph.schemas import DYNAMIC_MASK_ATTENTION
from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.ort import OrtRunner, graph_file, open_runner
from doge_deploy.targets.ort import lower
from doge_deploy.targets.ort.lower import PASSES
from doge_deploy.targets.ort.quantized import QuantizedWeightsPass
from doge_deploy.verify.run import verify

HEADS: dict[str, Any] = {"head_dim": 16, "keep_window_size": 64}
"""What FuseAttentionPass can take: heads of a multiple of 16, and a window that max_length 64 cannot exceed."""

CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (HEADS, {}),
    "dense-all-logits": (HEADS, {"logits": "all"}),
    "one-kv-head": ({**HEADS, "num_key_value_heads": 1}, {}),
    "kv-head-per-head": ({**HEADS, "num_key_value_heads": 4}, {}),
    "untied-biases": ({**HEADS, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, {}),
    "moe": ({**SMALL_MOE, **HEADS}, {}),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    made: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in made:
            config, options = CHECKPOINTS[name]
            path = tmp_path_factory.mktemp(name)
            checkpoint = save_random_doge(path / "checkpoint", **{**SMALL, **config, "vocab_size": 256})
            made[name] = open_bundle(make_bundle(checkpoint, path / "bundle", **options))
        return made[name]

    return get


def replay(runner: OrtRunner) -> tuple[list[FloatArray], dict[str, list[FloatArray]]]:
    """Prefill, a chunk and decode steps of two rows of different length: logits and the caches at the end."""
    ids = np.random.default_rng(0).integers(3, 256, (2, 32))
    runner.reset(2)
    logits, done = [], 0
    for width, lengths in ((13, [13, 9]), (1, [1, 1]), (5, [5, 3]), (1, [1, 1]), (1, [1, 1])):
        out = runner.run(ids[:, done : done + width], lengths)
        logits += [row[:n] if out.shape[1] > 1 else row for row, n in zip(out, lengths, strict=True)]
        done += width
    return logits, runner.cache()


def assert_same(candidate: OrtRunner, standard: OrtRunner) -> None:
    """All numbers equal up to the rounding of float32 sums."""
    logits, cache = replay(candidate)
    expected_logits, expected_cache = replay(standard)
    for found, expected in zip(logits, expected_logits, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    for name, rows in expected_cache.items():
        for found, expected in zip(cache[name], rows, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))


def lowered(bundle: Bundle, *names: str) -> tuple[ir.Model, dict[str, str], tuple[str, ...]]:
    """The standard graph after the passes of these names (all where none is given)."""
    passes = [make for make in PASSES if not names or make.__name__ in names]
    result = lower(ir.load(bundle.path / bundle.layout().file), passes)
    return result.model, result.declined, result.applied


def run_model(bundle: Bundle, model: ir.Model) -> OrtRunner:
    return open_runner(bundle, model=ir.to_proto(model).SerializeToString())


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("single", [make.__name__ for make in PASSES if make is not QuantizedWeightsPass])
def test_one_pass_alone_changes_nothing(single: str, name: str, bundles: Callable[[str], Bundle]) -> None:
    bundle = bundles(name)
    model, declined, applied = lowered(bundle, single)
    nothing_to_do = (
        (name == "untied-biases" and single == "TiedHeadPass")
        or (name != "moe" and single == "RoutedExpertsPass")
        or (name == "dense-all-logits" and single == "LogitRowsPass")
    )
    assert not declined
    assert applied == (() if nothing_to_do else (single,))
    assert_same(run_model(bundle, model), open_runner(bundle, portable=True))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_runs_is_the_lowered_graph_and_verifies(name: str, bundles: Callable[[str], Bundle]) -> None:
    bundle = bundles(name)
    assert graph_file(bundle.layout()) == "model.ort.onnx"
    assert_same(open_runner(bundle), open_runner(bundle, portable=True))
    report = verify(bundle.path, reference=str(bundle.path.parent / "checkpoint"), greedy_steps=8)
    assert report.graphs == {"static": "model.ort.onnx"}
    assert report.passed, [result.failures for result in report.results]


def test_the_head_does_not_keep_the_embedding_in_memory(bundles: Callable[[str], Bundle]) -> None:
    """What ONNX Runtime packs for a product it lets go of, unless another node reads it too."""
    model, _, _ = lowered(bundles("dense"))
    (head,) = [node for node in model.graph if node.op_type == "FusedMatMul"]
    (gather,) = [node for node in model.graph if node.op_type == "Gather" and node.outputs[0].name == "embedding"]
    packed, looked_up = head.inputs[1], gather.inputs[0]
    assert packed is not None and looked_up is not None and len(packed.uses()) == 1
    one, other = packed.const_value, looked_up.const_value
    assert isinstance(one, ir.ExternalTensor) and isinstance(other, ir.ExternalTensor) and one is not other
    assert (one.location, one.offset, one.length) == (other.location, other.offset, other.length)


def test_attention_is_one_operator(bundles: Callable[[str], Bundle]) -> None:
    model, declined, _ = lowered(bundles("dense"))
    kinds = [node.op_type for node in model.graph]
    assert not declined
    assert kinds.count("GroupQueryAttention") == SMALL["num_hidden_layers"]
    assert not {"TopK", "DynamicMaskAttention", "RotaryEmbedding"} & set(kinds)
    assert not model.functions


def add_input(node: ir.Node) -> None:
    node.resize_inputs(6)


def add_attribute(node: ir.Node) -> None:
    node.attributes["sliding_window"] = ir.AttrInt64("sliding_window", 8)


def keep_few(node: ir.Node) -> None:
    node.attributes["keep_window_size"] = ir.AttrInt64("keep_window_size", 8)


def other_start(node: ir.Node) -> None:
    shifted = ir.node("Identity", [node.inputs[4]])
    node.graph.insert_before(node, shifted)  # type: ignore[union-attr]
    node.replace_input_with(4, shifted.outputs[0])


UNKNOWN = {
    "a-further-input": (add_input, "6 inputs"),
    "a-further-attribute": (add_attribute, "sliding_window"),
    "windows-that-differ": (keep_few, "different numbers of keys"),
    "rows-that-start-elsewhere": (other_start, "start at the same place"),
}


@pytest.mark.parametrize(("change", "words"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_attention_declines_what_it_does_not_know(
    change: Callable[[ir.Node], None], words: str, bundles: Callable[[str], Bundle]
) -> None:
    bundle = bundles("dense")
    model = ir.load(bundle.path / bundle.layout().file)
    change([node for node in model.graph if node.op_type == DYNAMIC_MASK_ATTENTION][-1])
    before = [(node.op_type, [v and v.name for v in node.inputs]) for node in model.graph]
    result = lower(model, [make for make in PASSES if make.__name__ == "FuseAttentionPass"])
    assert not result.applied
    assert words in result.declined["FuseAttentionPass"]
    assert [(node.op_type, [v and v.name for v in node.inputs]) for node in result.model.graph] == before


def test_heads_that_the_operator_does_not_take(dense_doge: Path, tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(dense_doge, tmp_path / "b", max_length=8))
    record = bundle.layout().lowered.get("ort")
    assert record is not None
    assert "head_dim=8" in record.declined["FuseAttentionPass"]
    assert "PackLinearsPass" in record.applied
    assert record.requires == ""


def test_other_dtypes_stay_as_they_are(dense_doge: Path, tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(dense_doge, tmp_path / "b", dtype="fp16"))
    record = bundle.layout().lowered.get("ort")
    assert record is not None and record.file is None
    assert "FLOAT16" in record.declined["FuseAttentionPass"]
    assert graph_file(bundle.layout()) == "model.onnx"


@pytest.mark.parametrize(
    ("version", "file"),
    [
        ("1.31.2", "model.onnx"),
        ("1.31rc1", "model.onnx"),
        ("1.32.0", "model.ort.onnx"),
        ("1.33rc1", "model.ort.onnx"),
        ("1.100.0+cuda13", "model.ort.onnx"),
    ],
)
def test_an_older_runtime_gets_the_standard_graph(
    version: str, file: str, bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    assert graph_file(bundles("dense").layout()) == file, "it is not loaded"
    loaded = ModuleType("onnxruntime")
    loaded.__dict__["__version__"] = version
    monkeypatch.setattr("importlib.metadata.version", lambda name: pytest.fail("it is loaded"))
    monkeypatch.setitem(sys.modules, "onnxruntime", loaded)
    assert graph_file(bundles("dense").layout()) == file


def test_verify_finds_a_lowered_graph_that_forgets_the_score(
    bundles: Callable[[str], Bundle], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles("dense")

    def forget(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
        node.replace_input_with(10, None)

    broken = broken_copy(bundle.path, tmp_path / "b", graph=forget)
    reference = ["--reference", str(bundle.path.parent / "checkpoint"), "--greedy-steps", "4"]
    assert run_command(["verify", str(broken), *reference]) == 1
    assert "FAIL static/prefill: logits" in capfd.readouterr().out
    assert run_command(["verify", str(broken), *reference, "--portable"]) == 0
