"""The lowered mixture holds what the standard body of CDMoE computes: the same experts, ties included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from bundles import make_bundle
from random_doge import SMALL, SMALL_MOE, save_random_doge

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.config.expert_pairs import candidate_pairs
from doge_deploy.config.model import DogeFacts
from doge_deploy.graph.functions import cdmoe_function
from doge_deploy.graph.functions.text import OPSET
from doge_deploy.graph.passes.expose_selections import ExposeSelectionsPass
from doge_deploy.graph.schemas import CDMOE, DOMAIN, ROUTED_EXPERTS, VERSION
from doge_deploy.runtime.ort import open_runner
from doge_deploy.targets.ort import experts, experts_body, lower
from doge_deploy.targets.ort.experts import RoutedExpertsPass
from doge_deploy.targets.ort.quantized import QuantizedWeightsPass

HIDDEN, EXPERTS_NUMBER, TOP = 32, 50, 5
KEYS = 7

Arrays = dict[str, np.ndarray[Any, Any]]


def facts(**changes: Any) -> DogeFacts:
    """Of a mixture of 50 experts, one of which no pair of keys reaches."""
    config = {**SMALL_MOE, "hidden_size": HIDDEN, "num_experts": EXPERTS_NUMBER, "num_experts_per_tok": TOP, **changes}
    return DogeFacts.from_config({**config, "architectures": ["DogeForCausalLM"], "model_type": "doge"})


def mixture(routing: str, config: DogeFacts) -> ir.Model:
    """A graph of one CDMoE and its standard body."""
    types = {"hidden": HIDDEN, "router_logits": 2 * KEYS}
    inputs = [_value(name, ["batch", "sequence", width]) for name, width in types.items()]
    tables = [_value(name, [EXPERTS_NUMBER, HIDDEN]) for name in ("down_embed", "up_embed")]
    attributes = {
        "num_experts_per_tok": TOP,
        "norm_topk_prob": int(config.norm_topk_prob),
        "routing": routing,
        "activation": config.hidden_act,
    }
    node = ir.node(CDMOE, [*inputs, *tables], attributes, domain=DOMAIN)
    output = node.outputs[0]
    output.name, output.shape, output.type = "output", inputs[0].shape, inputs[0].type
    imports = {"": OPSET, DOMAIN: VERSION}
    graph = ir.Graph([*inputs, *tables], [output], nodes=[node], opset_imports=imports, name="mixture")
    function = cdmoe_function(config, routing=routing, pairs=candidate_pairs(TOP, KEYS))
    return ir.Model(graph, ir_version=11, functions=[function])


def _value(name: str, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def copied(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def lowered(model: ir.Model) -> ir.Model:
    result = lower(copied(model), [RoutedExpertsPass])
    assert result.applied == ("RoutedExpertsPass",), result.declined
    return result.model


def run(model: ir.Model, arrays: Arrays) -> Arrays:
    """The output, and the experts `[N, k]`."""
    shown = ExposeSelectionsPass()(copied(model)).model
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(shown).SerializeToString(), options)
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, arrays), strict=True))


def arrays(batch: int, tokens: int, *, tied: bool) -> Arrays:
    """Random inputs; `tied` has router logits of three values only."""
    random = np.random.default_rng(batch * 1000 + tokens)
    logits = (
        random.integers(-1, 2, (batch, tokens, 2 * KEYS)) if tied else random.normal(size=(batch, tokens, 2 * KEYS))
    )
    return {
        "hidden": random.normal(size=(batch, tokens, HIDDEN)).astype(np.float32),
        "router_logits": logits.astype(np.float32),
        "down_embed": random.normal(size=(EXPERTS_NUMBER, HIDDEN)).astype(np.float32),
        "up_embed": random.normal(size=(EXPERTS_NUMBER, HIDDEN)).astype(np.float32),
    }


CALLS = {"one-token": (1, 1), "step-of-3-rows": (3, 1), "63-tokens": (1, 63), "2-rows-of-9": (2, 9)}
CHUNKS = {"at-once": 1 << 20, "chunks-of-4": 4, "chunks-of-1": 1}


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("routing", ["reference", "per-token"])
def test_same_experts_and_same_sum(
    routing: str, call: tuple[int, int], chunk: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "ROWS_BYTES", chunk * 4 * TOP * HIDDEN)
    standard = mixture(routing, facts())
    given = arrays(*call, tied=tied)
    found, expected = run(lowered(standard), given), run(standard, given)
    np.testing.assert_array_equal(found["experts.0"], expected["experts.0"])
    largest = np.abs(expected["output"]).max()
    np.testing.assert_allclose(found["output"], expected["output"], rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "laplace"])
def test_other_activations_and_normalised_weights(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "ROWS_BYTES", 2 * 4 * TOP * HIDDEN)
    standard = mixture("per-token", facts(hidden_act=activation, norm_topk_prob=True))
    given = arrays(1, 5, tied=False)
    found, expected = run(lowered(standard), given)["output"], run(standard, given)["output"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def other_routing(node: ir.Node) -> None:
    node.attributes["routing"] = ir.AttrString("routing", "by-hash")


def further_attribute(node: ir.Node) -> None:
    node.attributes["capacity"] = ir.AttrInt64("capacity", 4)


UNKNOWN = {"routing": (other_routing, "by-hash"), "attribute": (further_attribute, "capacity")}


@pytest.mark.parametrize(("change", "words"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_declines_what_it_does_not_know(change: Callable[[ir.Node], None], words: str) -> None:
    model = mixture("reference", facts())
    change(model.graph[0])
    result = lower(model, [RoutedExpertsPass])
    assert words in result.declined["RoutedExpertsPass"]
    assert [node.op_type for node in result.model.graph] == [CDMOE]


BREAKS = {
    "keys-as-scores": (
        "pair_expert = MatMul (keys, pair_of_keys)",
        "pair_expert = MatMul (keys, pair_of_scores)",
    ),
    "ids-of-another-chunk": (
        "some_experts = Slice (EXPERTS, start_1d, end_1d, token_axis)",
        "no_start = Sub (start_1d, start_1d)\n    width = Sub (end_1d, start_1d)\n"
        "    some_experts = Slice (EXPERTS, no_start, width, token_axis)",
    ),
    "activation-left-out": ("{p}gate = Mul ({p}activated, {weights})", "{p}gate = Mul ({p}dot, {weights})"),
    "last-chunk-lost": ("chunks = Size (starts)", "all_chunks = Size (starts)\n    chunks = Sub (all_chunks, one)"),
    "weights-of-the-first-chunk": (
        "some_weights = Slice (weight_row, start_1d, end_1d, token_axis)",
        "zero_1d = Sub (start_1d, start_1d)\n    length = Sub (end_1d, start_1d)\n"
        "    some_weights = Slice (weight_row, zero_1d, length, token_axis)",
    ),
}


@pytest.mark.parametrize(("old", "new"), BREAKS.values(), ids=BREAKS.keys())
def test_a_broken_body_is_found(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "ROWS_BYTES", 4 * 4 * TOP * HIDDEN)
    texts = {name: getattr(experts_body, name) for name in ("_ROUTE", "_MIX", "_EXPERTS_OF")}
    assert any(old in text for text in texts.values())
    for name in texts:
        monkeypatch.setattr(experts_body, name, getattr(experts_body, name).replace(old, new))
    standard = mixture("reference", facts())
    given = arrays(1, 16, tied=False)
    expected = run(standard, given)["output"]
    try:
        found = run(lowered(standard), given)["output"]
    except Exception as error:  # a lost chunk does not fit the shape of the state
        assert "Reshape" in str(error), error
        return
    assert np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int8-asymmetric-16": {"quantize": "int8", "symmetric": False, "block_size": 16},
    "int4-asymmetric-16": {"quantize": "int4", "symmetric": False, "block_size": 16},
    "fp16": {"quantize": "fp16"},
    "int4-16-per-token": {"quantize": "int4", "block_size": 16, "routing": "per-token"},
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    made: dict[str, Bundle] = {}
    path = tmp_path_factory.mktemp("quantized")
    config = {**SMALL, **SMALL_MOE, "head_dim": 16, "hidden_size": 64, "vocab_size": 256, "keep_window_size": 64}
    checkpoint = save_random_doge(path / "checkpoint", **config)

    def get(name: str) -> Bundle:
        if name not in made:
            made[name] = open_bundle(make_bundle(checkpoint, path / name, **QUANTIZATIONS[name]))
        return made[name]

    return get


def replay(bundle: Bundle, model: ir.Model | None) -> np.ndarray[Any, Any]:
    """Logits of a prefill and of steps of two rows."""
    data = None if model is None else ir.to_proto(model).SerializeToString()
    runner = open_runner(bundle, model=data, portable=True)
    ids = np.random.default_rng(0).integers(3, 256, (2, 24))
    runner.reset(2)
    parts = [runner.run(ids[:, :13], [13, 9]), *(runner.run(ids[:, i : i + 1]) for i in range(13, 16))]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantized_tables_are_read_by_row(
    name: str, quantized: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "ROWS_BYTES", 4 * 4 * 3 * 64)
    bundle = quantized(name)
    model = lower(ir.load(bundle.path / "model.onnx"), [RoutedExpertsPass]).model
    (function,) = (function for function in model.functions.values() if function.name == ROUTED_EXPERTS)
    names = {node.op_type for node in ir.traversal.RecursiveGraphIterator(function.graph)}
    assert ("Gather" if name == "fp16" else "GatherBlockQuantized") in names
    assert name == "fp16" or "Gather" not in names
    tables = {value for node in model.graph if node.op_type == ROUTED_EXPERTS for value in node.inputs[6:]}
    assert all(value is not None and value.is_initializer() for value in tables), "nothing is dequantized whole"
    expected = replay(bundle, None)
    np.testing.assert_allclose(replay(bundle, model), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_wrong_zero_point_is_found(quantized: Callable[[str], Bundle]) -> None:
    bundle = quantized("int4-asymmetric-16")
    model = lower(ir.load(bundle.path / "model.onnx"), [RoutedExpertsPass]).model
    node = next(node for node in model.graph if node.op_type == ROUTED_EXPERTS)
    other = next(reversed([node for node in model.graph if node.op_type == ROUTED_EXPERTS]))
    node.replace_input_with(8, other.inputs[8])
    expected = replay(bundle, None)
    assert np.abs(replay(bundle, model) - expected).max() > 2e-5 * np.abs(expected).max()


def test_the_served_graph_dequantizes_no_table(quantized: Callable[[str], Bundle]) -> None:
    bundle = quantized("int4")
    record = bundle.layout().lowered.get("ort")
    assert record is not None and record.file is not None
    assert {QuantizedWeightsPass.__name__, RoutedExpertsPass.__name__} <= set(record.applied)
    kinds = [node.op_type for node in ir.load(bundle.path / record.file).graph]
    assert "DequantizeLinear" not in kinds and CDMOE not in kinds


def test_memory_of_a_prefill_is_that_of_a_chunk(tmp_path: Path) -> None:
    """Bytes that ONNX Runtime's arena reserves for 512 tokens: below the rows of all tokens at once."""
    standard = mixture("reference", facts())
    tokens, rows = 512 * 64, 512 * 64 * TOP * HIDDEN * 4

    def reserved(model: ir.Model) -> int:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        session.run(None, arrays(1, tokens, tied=False))
        events = json.loads(Path(session.end_profiling()).read_text())
        sizes = [int(e["args"]["output_size"]) for e in events if e.get("args", {}).get("output_size")]
        return max(sizes)

    assert reserved(standard) >= rows
    assert reserved(lowered(standard)) < rows / 4
