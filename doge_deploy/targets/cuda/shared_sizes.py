"""Sizes of the call, taken from its inputs once instead of from a value of each layer."""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.bundle.signature import SEQUENCE
from doge_deploy.targets.ort.matching import Emitter, attribute, take_place


class SharedSizesPass(ir.passes.InPlacePass):
    """Shape of one axis -> a constant, or the number of tokens of `input_ids`, where that is what the axis is called.

    Then what is made of sizes alone, such as which slots come before which token, is the same for all layers, and
    elimination of common subexpressions leaves one of it.

    Needs: functions inlined; `input_ids` `[B, Q]`. Promises: the same numbers.

    1. Fires where `start` and `end` name one axis whose size is a number or `sequence_length`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
        modified = False
        for node in list(graph):
            size = _size(node)
            if isinstance(size, int):
                emit = Emitter(node, node.outputs[0].name or "size")
                take_place(node.outputs[0], emit.ints(size, name="constant"))
                modified = True
            elif size == SEQUENCE and ids is not None and node.inputs[0] is not ids:
                node.replace_input_with(0, ids)
                node.attributes["start"] = ir.AttrInt64("start", 1)
                node.attributes["end"] = ir.AttrInt64("end", 2)
                modified = True
        return ir.passes.PassResult(model, modified)


def _size(node: ir.Node) -> int | str | None:
    """What the node gives, where it is one size that is known or has a name."""
    if node.op_type != "Shape" or node.domain != "" or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    start, end = attribute(node, "start"), attribute(node, "end")
    if start is None or end != start + 1 or start < 0:
        return None
    size = node.inputs[0].shape[start]
    return size if isinstance(size, int) else size.value
