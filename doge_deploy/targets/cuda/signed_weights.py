"""Weights of signed 4-bit numbers in ONNX Runtime's own operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from doge_deploy.targets.ort.matching import CONTRIB, Emitter, attribute, require_contrib, stored_again, take_place

FLIP = 0x88
"""The highest bits of two numbers."""

_FLIP = "signed_weights.flip"


class SignedWeightsPass(ir.passes.InPlacePass):
    """DequantizeLinear + Transpose + MatMul -> BitwiseXor + MatMulNBits, DequantizeLinear + Gather ->
    GatherBlockQuantized, for numbers from -8 to 7.

    `MatMulNBits` reads unsigned numbers of which 8 stands for zero. A signed number and the unsigned one that stands
    for it differ in the highest bit alone, so an exclusive or with 0x88 turns two of them at once. It depends on
    constants only: ONNX Runtime computes it when it loads the graph, and forgets the stored form.

    Needs: INT4 in external data, blocked along the rows of a 2-D weight, whole blocks, no zero point.
    Promises: the same weights; the state is not rounded.

    1. A reader of another kind keeps the DequantizeLinear.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if not _is_signed(node):
                continue
            for use in list(node.outputs[0].uses()):
                if use.node.op_type == "Transpose" and attribute(use.node, "perm") == (1, 0):
                    for product in [u.node for u in use.node.outputs[0].uses() if u.node.op_type == "MatMul"]:
                        _multiply(model.graph, node, product)
                        modified = True
                elif use.node.op_type == "Gather" and use.idx == 0 and attribute(use.node, "axis", 0) == 0:
                    _gather(node, use.node)
                    modified = True
        if modified:
            require_contrib(model)
        return ir.passes.PassResult(model, modified)


def _is_signed(node: ir.Node) -> bool:
    if node.op_type != "DequantizeLinear" or attribute(node, "axis", 1) != 1 or len(node.inputs) != 2:
        return False
    values, block = node.inputs[0], attribute(node, "block_size", 0)
    stored = None if values is None else values.const_value
    return (
        isinstance(stored, ir.ExternalTensor)
        and stored.dtype == ir.DataType.INT4
        and len(stored.shape) == 2
        and block >= 16
        and stored.shape.numpy()[1] % block == 0
    )


def _multiply(graph: ir.Graph, weight: ir.Node, product: ir.Node) -> None:
    values, scale = weight.inputs
    assert values is not None and isinstance(values.const_value, ir.ExternalTensor)
    rows, columns = values.const_value.shape.numpy()
    block = attribute(weight, "block_size")
    emit = Emitter(product, product.outputs[0].name or "product")
    unsigned = emit(
        "BitwiseXor", _bytes(graph, values.const_value, rows, columns, block), _flip(graph), name="unsigned"
    )
    node = emit(
        "MatMulNBits",
        product.inputs[0],
        unsigned.outputs[0],
        scale,
        domain=CONTRIB,
        K=columns,
        N=rows,
        bits=4,
        block_size=block,
        accuracy_level=0,
    )
    unsigned.outputs[0].dtype = ir.DataType.UINT8
    take_place(product.outputs[0], node.outputs[0])


def _gather(weight: ir.Node, gather: ir.Node) -> None:
    """The operator reads signed numbers as they are stored."""
    emit = Emitter(gather, gather.outputs[0].name or "rows")
    node = emit(
        "GatherBlockQuantized",
        weight.inputs[0],
        gather.inputs[1],
        weight.inputs[1],
        domain=CONTRIB,
        bits=4,
        block_size=attribute(weight, "block_size"),
        gather_axis=0,
        quantize_axis=1,
    )
    take_place(gather.outputs[0], node.outputs[0])


def _bytes(graph: ir.Graph, tensor: ir.ExternalTensor, rows: int, columns: int, block: int) -> ir.Value:
    """`[N, C/block, block/2]` uint8 on the bytes of `tensor`."""
    shape = (rows, columns // block, block // 2)
    return stored_again(graph, tensor, f"{tensor.name}.signed_blocks", dtype=ir.DataType.UINT8, shape=shape)


def _flip(graph: ir.Graph) -> ir.Value:
    if _FLIP not in graph.initializers:
        value = ir.Value(name=_FLIP, shape=ir.Shape(()), type=ir.TensorType(ir.DataType.UINT8))
        value.const_value = ir.tensor(np.uint8(FLIP), name=_FLIP)
        graph.register_initializer(value)
    return graph.initializers[_FLIP]
