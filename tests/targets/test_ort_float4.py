"""float4 for ONNX Runtime: weights to the bit, rounded inputs as the format says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest
from bundles import shared_bundle

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.graph.rounded_inputs import mark_rounded
from doge_deploy.targets.ort import WidenFloat4Pass
from doge_deploy.targets.trt.lowering import lower
from doge_deploy.targets.trt.rounded_inputs import FP4_BLOCK, RoundInputsPass


def rounding(scale: float) -> onnxruntime.InferenceSession:
    """A product with the identity, whose input `[B, Q, 32]` is rounded to float4."""
    x = ir.val("x", ir.DataType.FLOAT16, ir.Shape(["B", "Q", 32]))
    eye = ir.val("eye", ir.DataType.FLOAT16, ir.Shape([32, 32]))
    eye.const_value = ir.tensor(np.eye(32, dtype=np.float16), name="eye")
    product = ir.node("MatMul", [x, eye])
    product.outputs[0].name, product.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT16)
    product.outputs[0].shape = x.shape
    mark_rounded(product, "float4_e2m1fn", scale)
    graph = ir.Graph(
        [x], product.outputs, nodes=[product], initializers=[eye], opset_imports={"": 24, "doge": 1}, name="g"
    )
    model = RoundInputsPass()(ir.Model(graph, ir_version=11)).model
    data = ir.to_proto(WidenFloat4Pass()(model).model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def reference(x: npt.NDArray[np.float16], scale: float) -> npt.NDArray[np.float32]:
    """The same by ml_dtypes' own conversions."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, FP4_BLOCK)
    wished = np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / np.float32(scale)
    eight = np.minimum(wished, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
    four = (blocks / np.where(eight == 0, 1, eight)).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (four * eight).reshape(x.shape)


@pytest.mark.parametrize("scale", [1.0, 2.0**-8, 2.0**3], ids=str)
def test_inputs_are_rounded_as_the_format_says(scale: float) -> None:
    x = np.random.default_rng(0).standard_normal((2, 40, 32)).astype(np.float16)
    x[0, 0, :16], x[0, 1, 5], x[0, 2, :4] = 0, 900, (0.25, 0.75, 1.25, 1.75)
    (found,) = rounding(scale).run(None, {"x": x})
    expected = reference(x, scale).astype(np.float16)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, x)


def test_ties_go_to_even_numbers() -> None:
    """At scale 1 a block whose largest number is six is rounded to the numbers of the format themselves."""
    x = np.zeros((1, 1, 32), np.float16)
    x[0, 0, :9] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -2.5]
    (found,) = rounding(1.0).run(None, {"x": x})
    assert found[0, 0, :9].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -2]


def test_a_graph_for_engines_reads_float4_and_rounds_what_it_multiplies() -> None:
    bundle = open_bundle(shared_bundle("doge-tiny", quantize="nvfp4", dtype="fp16", max_length=64))
    model = ir.load(bundle.path / "model.onnx")
    standard = {node.op_type for node in model.graph}
    assert "TRT_FP4DynamicQuantize" not in standard
    lowered = lower(model)
    made = [node for node in lowered.graph if node.op_type == "TRT_FP4DynamicQuantize"]
    # three layers: q, k and v read one state, gate and up another; o and down their own
    assert len(made) == 3 * 4
    few = [v for v in lowered.graph.initializers.values() if v.dtype == ir.DataType.FLOAT4E2M1]
    assert len(few) == 3 * 7
    assert sum(v.dtype == ir.DataType.INT4 for v in lowered.graph.initializers.values()) == 1
    exact = lower(ir.load(bundle.path / "model.onnx"), round_inputs=False)
    assert not any(node.op_type in ("TRT_FP4DynamicQuantize", "QuantizeLinear") for node in exact.graph)
