"""Whether kernels read weights of few bits as they are stored."""

from __future__ import annotations

import onnx_ir as ir
from bundles import shared_bundle

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.targets.trt.layers import Kernel
from doge_deploy.targets.trt.layout import lower_layout
from doge_deploy.targets.trt.low_bits import examine, low_bit_numbers, problem


def tensor(name: str, dtype: str, shape: str) -> dict[str, str]:
    return {"name": name, "dtype": dtype, "shape": shape}


WEIGHT, SCALE = tensor("w", "Int4", "1,64,32"), tensor("s", "Half", "1,2,32")
STATE, RESULT = tensor("state", "Half", "1,-1,64"), tensor("y", "Half", "1,-1,32")


def kernel(name: str, inputs: list[dict[str, str]], outputs: list[dict[str, str]]) -> Kernel:
    return Kernel(name, "kgen", inputs, outputs, "", [])


NORM = kernel("norm", [tensor("input_ids", "Int64", "1,-1")], [STATE])
PRODUCT = kernel("product", [STATE, WEIGHT, SCALE], [RESULT])
TWICE = kernel("twice", [STATE, WEIGHT, WEIGHT, SCALE], [RESULT])
WIDE = tensor("wide", "Half", "1,64,32")
WIDEN = kernel("widen", [WEIGHT, SCALE], [WIDE])
HALF_PRODUCT = kernel("product", [STATE, WIDE], [RESULT])
LOOKUP = kernel("lookup", [tensor("input_ids", "Int64", "1,-1"), WEIGHT, SCALE], [STATE])
BINDINGS = ("input_ids", "logits")


def test_a_product_with_the_weight_as_it_is_stored() -> None:
    found = examine([NORM, PRODUCT], BINDINGS)
    assert (found.kernels, found.numbers, found.alone) == (1, 2048, ())
    assert problem(found, 2048) == ""
    assert examine([NORM, TWICE], BINDINGS) == found


def test_a_lookup_by_an_input_of_the_engine() -> None:
    assert problem(examine([LOOKUP, PRODUCT], BINDINGS), 4096) == ""
    assert examine([LOOKUP], ()).alone == ("lookup",), "without its binding nothing is known to change"


def test_a_weight_that_is_widened_in_every_call() -> None:
    found = examine([NORM, WIDEN, HALF_PRODUCT, PRODUCT], BINDINGS)
    assert found.alone == ("widen",)
    assert "widens weights of few bits in every call instead of multiplying with them: kernel widen" in problem(
        found, 1
    )
    two = examine([WIDEN, kernel("again", [tensor("v", "FP8", "4,4")], [WIDE])], BINDINGS)
    assert "kernel widen and 1 more reads" in problem(two, 1)


def test_a_weight_that_was_widened_for_good() -> None:
    found = examine([NORM, kernel("product", [STATE, tensor("w", "Half", "1,64,32")], [RESULT])], BINDINGS)
    assert problem(found, 2048) == (
        "widened weights of few bits when it built: kernels read 0 of their 2048 numbers as they are stored"
    )


def test_activations_of_few_bits_are_no_weights() -> None:
    quantize = kernel("quantize", [STATE], [tensor("q", "FP8", "1,-1,64")])
    found = examine([NORM, quantize, kernel("fp8", [tensor("q", "FP8", "1,-1,64")], [RESULT])], BINDINGS)
    assert (found.kernels, found.numbers) == (0, 0)


def test_numbers_of_a_graph() -> None:
    """A tied embedding is read twice, every other matrix once; what keeps its dtype is not counted."""
    bundle = open_bundle(shared_bundle("doge-tiny-moe", quantize="int4", dtype="fp16", max_length=64))
    lowered = lower_layout(bundle, bundle.layout("static"), use_plugins=False)
    shapes = {name: info.shape for name, info in open_checkpoint("doge-tiny-moe").tensors.items()}
    matrices = {
        name: shape[0] * shape[1]
        for name, shape in shapes.items()
        if len(shape) == 2 and "dt_proj" not in name and "router_gate" not in name
    }
    assert lowered.low_bit_numbers() == sum(matrices.values()) + matrices["model.embed_tokens.weight"]


def test_the_scale_of_a_scale_is_no_weight() -> None:
    eighth = ir.val("scale", ir.DataType.FLOAT8E4M3FN, ir.Shape([4, 2]))
    whole = ir.val("whole", ir.DataType.FLOAT16, ir.Shape([]))
    weight = ir.val("w", ir.DataType.FLOAT4E2M1, ir.Shape([4, 32]))
    inner = ir.node("DequantizeLinear", [eighth, whole])
    outer = ir.node("DequantizeLinear", [weight, inner.outputs[0]], {"axis": 1, "block_size": 16})
    turned = ir.node("Transpose", [outer.outputs[0]], {"perm": [1, 0]})
    x = ir.val("x", ir.DataType.FLOAT16, ir.Shape([1, 32]))
    product = ir.node("MatMul", [x, turned.outputs[0]])
    graph = ir.Graph(
        [x],
        product.outputs,
        nodes=[inner, outer, turned, product],
        initializers=[eighth, whole, weight],
        opset_imports={"": 24},
        name="g",
    )
    assert low_bit_numbers(ir.Model(graph, ir_version=11)) == 128
