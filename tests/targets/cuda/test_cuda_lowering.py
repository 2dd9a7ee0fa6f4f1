"""The graph for ONNX Runtime's CUDA provider: which nodes it has kernels for, and that it is the same graph."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from bundles import shared_bundle
from random_doge import SMALL, SMALL_MOE, shared_doge

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.runtime import cuda
from doge_deploy.runtime.ort import open_runner
from doge_deploy.targets.cuda import attention_lengths, placement, signed_weights
from doge_deploy.targets.cuda.lowering import lower, lower_bytes
from doge_deploy.targets.cuda.placement import SHAPE_OPERATORS, place
from doge_deploy.targets.cuda.write import ON_CPU
from doge_deploy.verify.run import verify

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"keep_window_size": 64},
    "window": {},
    "moe": {**SMALL_MOE, "keep_window_size": 64},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{model}-{dtype}": (model, {"dtype": dtype}) for model in MODELS for dtype in ("fp32", "fp16")
} | {f"int4-{dtype}": ("window", {"dtype": dtype, "quantize": "int4"}) for dtype in ("fp32", "fp16")}

PAGE = Path(__file__).parents[3] / "docs" / "cuda.md"


def bundle_of(config: str) -> Path:
    model, options = CONFIGS[config]
    checkpoint = shared_doge(**{**SMALL, **MODELS[model], "hidden_size": 64, "head_dim": 16})
    return shared_bundle(checkpoint, **options)


def standard(config: str) -> ir.Model:
    return ir.load(bundle_of(config) / "model.onnx")


@pytest.mark.parametrize("config", CONFIGS)
def test_only_arithmetic_of_shapes_is_left_to_the_cpu(config: str) -> None:
    result = lower(standard(config))
    assert not result.declined
    assert result.placement.cpu == ()
    assert set(result.placement.shapes) <= SHAPE_OPERATORS
    products = result.placement.device.get("MatMulNBits", 0)
    assert (products > 0) == config.startswith("int4")
    assert "DequantizeLinear" not in result.placement.device, "every quantized weight is read as it is stored"
    row = f"| {config} | {sum(result.placement.device.values())} | {sum(result.placement.shapes.values())} | 0 |"
    assert row in PAGE.read_text(encoding="utf-8"), f"docs/cuda.md lacks the row {row}"


@pytest.mark.parametrize("config", [config for config in CONFIGS if not config.startswith("int4")])
def test_the_numbers_are_those_of_the_standard_graph_to_the_bit(config: str) -> None:
    assert differences(config) == 0


@pytest.mark.parametrize(("config", "most"), [("int4-fp32", 2e-5), ("int4-fp16", 2e-2)])
def test_products_with_stored_weights_are_the_same_up_to_rounding(config: str, most: float) -> None:
    assert differences(config) <= most


def differences(config: str) -> float:
    """Between the logits of the two graphs in the CPU provider: a batch with padding, a step, a chunk."""
    bundle = open_bundle(bundle_of(config))
    runners = open_runner(bundle, portable=True, threads=1), cuda.open_runner(bundle, bundle.layout(), device="cpu")
    rng, most = np.random.default_rng(0), 0.0
    for runner in runners:
        runner.reset(2)
    for width, lengths in ((20, [20, 11]), (1, [1, 1]), (5, [5, 2])):
        ids = rng.integers(3, 64, (2, width))
        one, other = (runner.run(ids, lengths).astype(np.float64) for runner in runners)
        most = max(most, float(np.abs(one - other).max()))
    return most


def test_one_key_too_few_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(emit: Any, inputs: Any) -> ir.Value:
        return emit("Sub", right(emit, inputs), emit("Constant", name="cut", value_int=1).outputs[0]).outputs[0]

    right = attention_lengths._lengths
    monkeypatch.setattr(attention_lengths, "_lengths", short)
    assert differences("dense-fp32") > 1e-3


def test_signed_numbers_read_as_unsigned_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signed_weights.FLIP == 0x88
    monkeypatch.setattr(signed_weights, "FLIP", 0)
    assert differences("int4-fp16") > 0.5


def test_an_operator_that_the_table_lacks_is_named() -> None:
    model = standard("dense-fp16")
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    last = logits.producer()
    assert last is not None
    node = ir.node("Celu", [last.inputs[0]], name="planted")
    model.graph.insert_before(last, node)
    node.outputs[0].name, node.outputs[0].dtype = "planted", ir.DataType.FLOAT16
    last.replace_input_with(0, node.outputs[0])
    (found,) = lower(model).placement.cpu
    assert re.fullmatch(r"Celu_0 \(Celu\): Celu is not in the table of onnxruntime-gpu [\d.]+", found)


def test_a_type_without_a_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {**placement.table()["operators"]}
    changed["Attention"] = {"since": 24, "types": {"T1": ["float32"]}}
    monkeypatch.setattr(placement, "table", lambda: {"onnxruntime": "9.9", "operators": changed})
    assert not lower(standard("dense-fp32")).placement.cpu
    found = lower(standard("dense-fp16")).placement.cpu
    assert found == tuple(
        f"Attention_{layer} (Attention): T1 is float16, and onnxruntime-gpu 9.9 has kernels for float32"
        for layer in range(SMALL["num_hidden_layers"])
    )


def test_a_kernel_of_another_version_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime matches a kernel that is documented as "23+" with version 23 alone."""
    changed = {**placement.table()["operators"]}
    changed["Reshape"] = {**changed["Reshape"], "since": 23}
    monkeypatch.setattr(placement, "table", lambda: {"onnxruntime": "9.9", "operators": changed})
    found = lower(standard("dense-fp32")).placement.cpu
    assert found and all("knows version 23 of it, this is 24" in line for line in found)


def test_lengths_are_not_arithmetic_of_shapes() -> None:
    """Else ONNX Runtime would copy an input of the graph to the processor in every call."""
    model = lower(standard("dense-fp32")).model
    attention = next(node for node in model.graph if node.op_type == "Attention")
    lengths = attention.inputs[6]
    assert lengths is not None and lengths.producer() is not None
    made_of = [value.producer() for value in lengths.producer().inputs if value is not None]  # type: ignore[union-attr]
    assert "Shape" not in [node.op_type for node in made_of if node is not None]


def test_the_mask_of_causality_is_made_once() -> None:
    assert lower(standard("dense-fp32")).placement.device["LessOrEqual"] == 1


def test_a_lowered_graph_stays_as_it_is() -> None:
    bundle = bundle_of("dense-fp32")
    once = lower_bytes((bundle / "model.onnx").read_bytes(), bundle)
    assert lower_bytes(once, bundle) == once


def test_bfloat16_is_refused() -> None:
    model = standard("dense-fp16")
    next(value for value in model.graph.outputs if value.name == "logits").dtype = ir.DataType.BFLOAT16
    with pytest.raises(UnsupportedModelError, match="this graph gives bfloat16: export with --dtype fp16"):
        lower(model)


def test_nothing_is_written_unless_it_is_asked_for() -> None:
    checkpoint = shared_doge(**MODELS["dense"])
    plain, asked = shared_bundle(checkpoint), shared_bundle(checkpoint, lower_for=("cuda",))
    without, manifest = open_bundle(plain).manifest, open_bundle(asked).manifest
    assert "cuda" not in without.layouts["static"].lowered
    lowered = manifest.layouts["static"].lowered["cuda"]
    assert lowered.file == "model.cuda.onnx" and ON_CPU not in lowered.declined
    same = {name: entry for name, entry in manifest.files.items() if name != lowered.file}
    assert same == dict(without.files)
    assert place(ir.load(asked / "model.cuda.onnx")).cpu == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower_for": ("cudo",)}, "--lower-for cudo: must be one of cuda"),
        ({"lower_for": ("ort",)}, "--lower-for ort: must be one of cuda"),
        ({"lower_for": ("cuda",), "kv_cache": ("growing",)}, "--lower-for cuda needs a bundle with --kv-cache static"),
    ],
    ids=["unknown", "always-lowers", "growing"],
)
def test_what_cannot_be_lowered_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        shared_bundle(shared_doge(**MODELS["dense"]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowering_for": "ort"}, "--lowering-for ort: must be one of cuda"),
        ({"lowering_for": "cudo"}, "unknown backend 'cudo'"),
        ({"lowering_for": "cuda", "backend": "trt"}, "--lowering-for names what is judged; leave out --lowering"),
        ({"lowering_for": "cuda", "lowering": True}, "--lowering-for names what is judged; leave out --lowering"),
    ],
    ids=["has-none", "unknown", "backend", "lowering"],
)
def test_what_cannot_be_judged_without_a_gpu(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        verify(bundle_of("dense-fp32"), **options)


@pytest.mark.sweep
@pytest.mark.parametrize("model", ["doge-tiny", "doge-tiny-moe"])
@pytest.mark.parametrize("options", [{}, {"dtype": "fp16"}, {"dtype": "fp16", "quantize": "int4"}], ids=str)
def test_verify_judges_it_on_the_cpu_provider(model: str, options: dict[str, Any]) -> None:
    report = verify(shared_bundle(model, **options), lowering_for="cuda", greedy_steps=16)
    assert report.graphs == {"static": "model.onnx, --backend cuda (on the CPU provider)"}
    report.require_passed()
