"""Logits of more than the last token, where a call asks for them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from doge_deploy.bundle.signature import BATCH, LOGIT_OFFSETS, LOGIT_ROWS
from doge_deploy.targets.ort.matching import Emitter, constant_ints

_LENGTHS = "sequence_lengths"


class LogitRowsPass(ir.passes.InPlacePass):
    """Gather(last token) -> Gather(tokens at some distances from the last one), which a further input says.

    The input is optional: where a call does not give it, it is `[0]`, and the logits are those of the last token. So a
    prompt pays for one row of the head, and a guess at the next tokens is checked in one call.

    Needs: GatherND of each row's last token by the input `sequence_lengths`. Promises: the same numbers, in as many
    rows as there are distances.

    1. Fires where the index of a GatherND with `batch_dims=1` is Unsqueeze(Sub(sequence_lengths, 1)).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        lengths = next((value for value in graph.inputs if value.name == _LENGTHS), None)
        gathers = [node for node in graph if node.op_type == "GatherND" and _is_last_token(node, lengths)]
        if lengths is None or not gathers:
            return ir.passes.PassResult(model, False)
        offsets = ir.Value(
            name=LOGIT_OFFSETS,
            shape=ir.Shape([LOGIT_ROWS]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(np.zeros(1, np.int64), name=LOGIT_OFFSETS),
        )
        graph.inputs.append(offsets)
        graph.initializers[LOGIT_OFFSETS] = offsets
        emit = Emitter(gathers[0], LOGIT_ROWS)
        last = emit("Sub", lengths, emit.ints(1, name="one"), name="last").outputs[0]
        column = emit("Unsqueeze", last, emit.ints(1, name="columns"), name="column").outputs[0]
        tokens = emit("Sub", column, offsets, name="tokens").outputs[0]
        index = emit("Unsqueeze", tokens, emit.ints(2, name="depth"), name="index").outputs[0]
        for node in gathers:
            node.replace_input_with(1, index)
            _forget_shapes(node)
        for output in graph.outputs:
            if output.name == "logits" and output.shape is not None:
                output.shape = ir.Shape([BATCH, LOGIT_ROWS, output.shape[2]])
        return ir.passes.PassResult(model, True)


def _is_last_token(node: ir.Node, lengths: ir.Value | None) -> bool:
    index = node.inputs[1].producer() if node.inputs[1] is not None else None
    if index is None or index.op_type != "Unsqueeze" or index.inputs[0] is None:
        return False
    last = index.inputs[0].producer()
    return (
        lengths is not None
        and last is not None
        and last.op_type == "Sub"
        and last.inputs[0] is lengths
        and constant_ints(last.inputs[1]) == (1,)
    )


def _forget_shapes(node: ir.Node) -> None:
    """What is computed from the gathered tokens has no longer one of them."""
    waiting = list(node.outputs)
    while waiting:
        value = waiting.pop()
        if not value.is_graph_output():
            value.shape = None
            waiting += [output for use in value.uses() for output in use.node.outputs]
        elif value.name != "logits":
            raise ValueError(f"{value.name} is computed from the last token alone")
