"""Operators that round the inputs of products in an engine."""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.graph.rounded_inputs import RoundedInput, rounded_input

TENSORRT = "trt"
"""Domain of TensorRT's own operators."""

DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
"""Rounds to float4 e2m1 with a float8 scale per block that it makes of the block's largest number.

Reference: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/DynamicQuantize.html
"""

FP4_BLOCK = 16


class RoundInputsPass(ir.passes.InPlacePass):
    """Let products whose input an engine rounds read the rounded input.

    Needs: products marked by `doge_deploy.graph.rounded_inputs`.
    Promises: other nodes stay. float8: QuantizeLinear and DequantizeLinear with the scale that was noted. float4:
    `DYNAMIC_QUANTIZE`, whose scales follow the numbers of the call, and a DequantizeLinear for scales and for numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        products = [(node, found) for node in model.graph if (found := rounded_input(node)) is not None]
        for product, found in products:
            round_input = _to_float4 if found.dtype == "float4_e2m1fn" else _to_float8
            product.replace_input_with(0, round_input(model.graph, product, found))
        if any(found.dtype == "float4_e2m1fn" for _, found in products):
            model.graph.opset_imports[TENSORRT] = 1
        return ir.passes.PassResult(model, bool(products))


def _to_float8(graph: ir.Graph, product: ir.Node, found: RoundedInput) -> ir.Value:
    source, scale = _source(product), _constant(graph, product, found.scale)
    zero = ir.node("Constant", [], {"value": ir.tensor(0.0, ir.DataType.FLOAT8E4M3FN)})
    narrow = ir.node("QuantizeLinear", [source, scale, zero.outputs[0]])
    wide = ir.node("DequantizeLinear", [narrow.outputs[0], scale])
    return _placed(graph, product, [zero, narrow, wide], source)


def _to_float4(graph: ir.Graph, product: ir.Node, found: RoundedInput) -> ir.Value:
    source, scale = _source(product), _constant(graph, product, found.scale)
    attributes = {"axis": -1, "block_size": FP4_BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)}
    narrow = ir.node(DYNAMIC_QUANTIZE, [source, scale], attributes, domain=TENSORRT, num_outputs=2)
    scales = ir.node("DequantizeLinear", [narrow.outputs[1], scale])
    blocks = {"axis": -1, "block_size": FP4_BLOCK}
    wide = ir.node("DequantizeLinear", [narrow.outputs[0], scales.outputs[0]], blocks)
    return _placed(graph, product, [narrow, scales, wide], source)


def _source(product: ir.Node) -> ir.Value:
    source = product.inputs[0]
    assert source is not None and source.dtype is not None
    return source


def _constant(graph: ir.Graph, product: ir.Node, number: float) -> ir.Value:
    """A scale in the dtype of the product's input."""
    dtype = _source(product).dtype
    assert dtype is not None
    node = ir.node("Constant", [], {"value": ir.tensor(number, dtype)})
    graph.insert_before(product, node)
    node.outputs[0].shape, node.outputs[0].type = ir.Shape([]), ir.TensorType(dtype)
    return node.outputs[0]


def _placed(graph: ir.Graph, product: ir.Node, nodes: list[ir.Node], source: ir.Value) -> ir.Value:
    graph.insert_before(product, nodes)
    result = nodes[-1].outputs[0]
    result.shape, result.type = source.shape, source.type
    return result
