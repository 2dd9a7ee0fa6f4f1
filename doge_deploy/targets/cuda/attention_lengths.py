"""Attention that stops behind the last key in use."""

from __future__ import annotations

import onnx_ir as ir

from doge_deploy.targets.ort.matching import Declined, Emitter

_LENGTHS_INPUT = 6
"""Of `Attention` 24: `nonpad_kv_seqlen`."""


class AttentionLengthsPass(ir.passes.InPlacePass):
    """Tell `Attention` how many slots of each row's cache hold something: `nonpad_kv_seqlen`.

    A static cache has `max_length` slots, and the mask hides those behind the last token. With the number of keys the
    provider's kernels need not read them. Slots that hold padding of this call are counted: the mask hides them.

    Needs: functions inlined; inputs `input_ids` `[B, Q]` and `write_indices` `[B]`; `Attention` of opset 24 without
    past and present. Promises: the same numbers.

    1. Must not fire where the node already has lengths.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        inputs = {value.name: value for value in model.graph.inputs}
        nodes = [
            node
            for node in model.graph
            if node.op_type == "Attention" and node.domain == "" and len(node.outputs) == 1 and len(node.inputs) == 4
        ]
        if not nodes:
            raise Declined("no attention has a mask alone")
        if not {"input_ids", "write_indices"} <= set(inputs):
            raise Declined("input_ids and write_indices are not both inputs of the graph")
        lengths = _lengths(Emitter(nodes[0], "keys_in_use"), inputs)
        for node in nodes:
            node.resize_inputs(_LENGTHS_INPUT + 1)
            node.replace_input_with(_LENGTHS_INPUT, lengths)
        return ir.passes.PassResult(model, True)


def _lengths(emit: Emitter, inputs: dict[str | None, ir.Value]) -> ir.Value:
    """`write_indices` + Q. A sum with Shape itself would be arithmetic of shapes to ONNX Runtime: it would copy
    `write_indices` to the processor's memory, and the lengths back, in every call. A Range lies on the device.
    """
    zero = emit("Constant", name="zero", value_int=0).outputs[0]
    one = emit("Constant", name="one", value_int=1).outputs[0]
    last = emit("Constant", name="last", value_int=-1).outputs[0]
    width = emit("Squeeze", emit("Shape", inputs["input_ids"], start=1, end=2, name="shape").outputs[0], name="width")
    rows = emit("Range", zero, width.outputs[0], one, name="rows").outputs[0]
    behind = emit("Add", emit("Gather", rows, last, axis=0, name="last_row").outputs[0], one, name="behind").outputs[0]
    return emit("Add", inputs["write_indices"], behind, name="lengths").outputs[0]
