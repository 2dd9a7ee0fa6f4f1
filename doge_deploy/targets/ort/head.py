"""A tied vocabulary projection without a transposed copy of the embedding."""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.targets.ort.matching import (
    CONTRIB,
    Emitter,
    attribute,
    is_weight,
    require_contrib,
    stored_again,
    take_place,
)


class TiedHeadPass(ir.passes.InPlacePass):
    """Transpose(embedding) + MatMul -> FusedMatMul, which reads the embedding `[V, C]` as it is.

    ONNX Runtime packs the weight of a product, and then keeps it in memory as it was too if another node reads it. So
    the product gets an initializer of its own, of the same bytes of the weight file: ONNX Runtime maps the file for
    each, lets go of what it packed, and of what is gathered only the rows that are looked up are ever read.

    Needs: a MatMul by a transposed initializer, or by the cast of one. Promises: the same products in another order.

    1. Fires where `Transpose(perm=[1, 0])` of a 2-D initializer is read by a MatMul as its second input.
    2. A weight that is cast, or is not in external data, stays one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if node.op_type == "MatMul" and _transposed(node) is not None]
        for node in found:
            weight = _transposed(node)
            assert weight is not None
            emit = Emitter(node, node.outputs[0].name or "head")
            fused = emit("FusedMatMul", node.inputs[0], _alone(model.graph, weight), domain=CONTRIB, transB=1)
            take_place(node.outputs[0], fused.outputs[0])
        if found:
            require_contrib(model)
        return ir.passes.PassResult(model, bool(found))


def _transposed(node: ir.Node) -> ir.Value | None:
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    if transpose is None or transpose.op_type != "Transpose" or attribute(transpose, "perm") != (1, 0):
        return None
    weight = transpose.inputs[0]
    return weight if is_weight(weight) else None


def _alone(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """The weight as an initializer that nobody else reads, where it lies in a file."""
    stored = weight.const_value
    if not isinstance(stored, ir.ExternalTensor):
        return weight
    return stored_again(graph, stored, f"{weight.name}.head", dtype=stored.dtype, shape=stored.shape.numpy())
