"""float4 for ONNX Runtime's CPU provider, which has no such numbers."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from doge_deploy.graph.functions.text import parse_function
from doge_deploy.graph.schemas import DOMAIN, VERSION
from doge_deploy.targets.ort.matching import Emitter, attribute, take_place

DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"

_ROUND = """
    float_x = Cast <to = 1> (x)
    float_whole = Cast <to = 1> (whole)
    shape = Shape (x)
    blocks_shape = Constant <value_ints = [0, 0, -1, 16]> ()
    blocks = Reshape (float_x, blocks_shape)
    magnitudes = Abs (blocks)
    last = Constant <value_ints = [-1]> ()
    largest = ReduceMax <keepdims = 1> (magnitudes, last)
    six = Constant <value_float = 6.0> ()
    of_largest = Div (largest, six)
    wished = Div (of_largest, float_whole)
    one = Constant <value_float = 1.0> ()
    eight_bits = Cast <to = 17, saturate = 1> (wished)
    scale_number = Cast <to = 1> (eight_bits)
    scale = Mul (scale_number, float_whole)
    none = Constant <value_float = 0.0> ()
    is_none = Equal (scale, none)
    divisor = Where (is_none, one, scale)
    scaled = Div (magnitudes, divisor)
    two = Constant <value_float = 2.0> ()
    four = Constant <value_float = 4.0> ()
    doubled = Mul (scaled, two)
    round_doubled = Round (doubled)
    by_halves = Div (round_doubled, two)
    by_ones = Round (scaled)
    halved = Div (scaled, two)
    round_halved = Round (halved)
    by_twos = Mul (round_halved, two)
    below_two = Less (scaled, two)
    below_four = Less (scaled, four)
    upper = Where (below_four, by_ones, by_twos)
    number = Where (below_two, by_halves, upper)
    cut = Min (number, six)
    sign = Sign (blocks)
    signed = Mul (cut, sign)
    wide = Mul (signed, scale)
    joined = Reshape (wide, shape)
    y = CastLike (joined, x)
"""
"""Blocks of 16 of the last axis of `[B, Q, C]`: the numbers of float4 nearest to them, to even ones where two are as
near, at the float8 scale that gives the largest number of the block a six."""


class WidenFloat4Pass(ir.passes.InPlacePass):
    """Numbers of float4 as operators that the CPU provider has.

    Needs: weights as `DequantizeLinear` of an initializer `[N, C]` along rows with scales per block; rounded inputs as
    `doge_deploy.targets.trt.rounded_inputs` writes them.
    Promises: the same weights to the bit, by a table of the sixteen numbers. Inputs are rounded as NVIDIA describes its
    operator; no device was asked.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        weights = [node for node in graph if node.op_type == "DequantizeLinear" and _is_float4(node.inputs[0])]
        inputs = [node for node in graph if node.op_type == DYNAMIC_QUANTIZE]
        for node in inputs:
            _round(node)
        for node in weights:
            _widen(node)
        if inputs:
            function = parse_function("RoundFloat4", ["x", "whole"], ["y"], [], _ROUND)
            model.functions[function.identifier()] = function
            graph.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, bool(weights or inputs))


def widen_float4(model: Path | bytes) -> Path | bytes:
    """A graph in a form that the CPU provider runs, see `WidenFloat4Pass`; as it is where it has no such numbers.

    External data is left where it is.
    """
    loaded = ir.load(model) if isinstance(model, Path) else ir.from_proto(_parse(model))
    result = WidenFloat4Pass()(loaded)
    if not result.modified:
        return model
    data: bytes = ir.to_proto(result.model).SerializeToString()
    return data


def _parse(data: bytes):  # type: ignore[no-untyped-def]
    import onnx

    return onnx.load_model_from_string(data)


def _is_float4(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT4E2M1


def _widen(node: ir.Node) -> None:
    """A weight: its codes look numbers up in a table, which are multiplied with their block's scale."""
    codes, scale = node.inputs
    result = node.outputs[0]
    assert codes is not None and scale is not None and codes.shape is not None
    of_scale = scale.producer()
    assert of_scale is not None and of_scale.inputs[1] is not None
    dtype = of_scale.inputs[1].dtype  # of the graph: a lowered one does not say it of every value
    assert dtype is not None
    graph, block = node.graph, attribute(node, "block_size")
    assert isinstance(graph, ir.Graph) and isinstance(codes.const_value, ir.ExternalTensor)
    rows, columns = codes.shape.numpy()
    stored = codes.const_value
    name = f"{codes.name}.codes"
    view = ir.Value(name=name, shape=ir.Shape((rows, columns)), type=ir.TensorType(ir.DataType.UINT4))
    view.const_value = ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        ir.DataType.UINT4,
        shape=ir.Shape((rows, columns)),
        name=name,
        base_dir=stored.base_dir,
    )
    graph.register_initializer(view)
    emit = Emitter(node, f"{codes.name}.wide")
    numbers = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    table = emit("Constant", name="table", value=ir.tensor(numbers)).outputs[0]
    table = emit("Cast", table, to=int(dtype), name="numbers").outputs[0]
    index = emit("Cast", view, to=int(ir.DataType.INT32), name="index").outputs[0]
    plain = emit("Gather", table, index, axis=0, name="plain").outputs[0]
    blocks = emit("Reshape", plain, emit.ints(rows, columns // block, block, name="by_block"), name="blocks").outputs[0]
    scales = emit("Unsqueeze", scale, emit.ints(2, name="axis"), name="scales").outputs[0]
    scaled = emit("Mul", blocks, scales, name="scaled").outputs[0]
    joined = emit("Reshape", scaled, emit.ints(rows, columns, name="shape"), name="joined").outputs[0]
    take_place(result, joined)
    graph.remove(node, safe=True)
    if not codes.uses() and codes.name is not None:
        del graph.initializers[codes.name]


def _round(node: ir.Node) -> None:
    """An input: rounded, and wide again, in one local function."""
    source, whole = node.inputs
    (wide,) = (use.node for use in node.outputs[0].uses())
    (scales,) = (use.node for use in node.outputs[1].uses())
    emit = Emitter(node, f"{wide.outputs[0].name}.rounded")
    rounded = emit("RoundFloat4", source, whole, domain=DOMAIN).outputs[0]
    take_place(wide.outputs[0], rounded)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.remove([wide, scales, node], safe=True)
