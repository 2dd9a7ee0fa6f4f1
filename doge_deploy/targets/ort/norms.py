"""RMS norms with the residual sum in front of them, as one operator of ONNX Runtime."""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.graph.stages import move
from doge_deploy.targets.ort.matching import CONTRIB, Emitter, attribute, expect, require_contrib


class FuseNormsPass(ir.passes.InPlacePass):
    """Add + RMSNormalization -> SkipSimplifiedLayerNormalization, which gives both the norm and the sum.

    Needs: norms over the last axis with float32 statistics.
    Promises: the same numbers up to the order of a sum.

    1. Fires where the Add has two computed inputs; the sum stays available to its other readers.
    2. Must not fire on a sum with an initializer: the fused operator adds equal shapes only.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if node.op_type == "RMSNormalization" and _sum(node) is not None]
        expect(bool(found), "no norm follows a sum of two states")
        for node in found:
            expect(attribute(node, "axis", -1) == -1, f"{node.name} is a norm over another axis than the last")
            expect(attribute(node, "stash_type", 1) == 1, f"{node.name} has statistics in another dtype than float32")
        for node in found:
            _fuse(node)
        require_contrib(model)
        return ir.passes.PassResult(model, True)


def _sum(norm: ir.Node) -> ir.Node | None:
    """The residual sum that a norm reads."""
    x = norm.inputs[0]
    node = x.producer() if x is not None else None
    if node is None or node.op_type != "Add" or any(v is None or v.is_initializer() for v in node.inputs):
        return None
    return node


def _fuse(norm: ir.Node) -> None:
    add = _sum(norm)
    assert add is not None
    emit = Emitter(add, norm.outputs[0].name or "norm")
    op_type = "SkipSimplifiedLayerNormalization"
    epsilon = attribute(norm, "epsilon", 1e-5)
    fused = emit(op_type, *add.inputs, norm.inputs[1], domain=CONTRIB, outputs=4, epsilon=epsilon, name="skip")
    for old, new in ((norm.outputs[0], fused.outputs[0]), (add.outputs[0], fused.outputs[3])):
        move(old, new)
    norm.outputs[0].replace_all_uses_with(fused.outputs[0])
    add.outputs[0].replace_all_uses_with(fused.outputs[3])
    for unused in fused.outputs[1:3]:
        unused.name = ""
