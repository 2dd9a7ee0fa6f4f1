"""Weights stored in half precision and computed with in float32."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from doge_deploy.graph.passes.pending import pending
from doge_deploy.graph.passes.quantize_weights import KEPT, KNOWN_READERS
from doge_deploy.graph.passes.transpose_weights import TRANSPOSED_SUFFIX


class HalfWeightsPass(ir.passes.InPlacePass):
    """Initializers of linear layers, embedding, head and expert tables become float16, and a `Cast` to float32 follows.

    Needs: float32 initializers named as in the checkpoint (with the transpose suffix where TransposeWeightsPass ran),
    data not yet attached.
    Promises: every reader gets the rounded weight in float32; of an embedding only the rows that are looked up are
    cast. No tensor is stored twice.

    1. Fires on the weights that QuantizeWeightsPass would take, with rows of any length.
    2. Must not fire on the layers in `KEPT`, nor on weights with a reader that is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, str] = {}
        """2-D checkpoint tensors that were left as they are -> why."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for weight in list(model.graph.initializers.values()):
            if weight.shape is None or len(weight.shape) != 2 or weight.name is None or weight.name.startswith("rope_"):
                continue
            readers = {use.node.op_type for use in weight.uses()}
            reason = kept_whole(weight.name, tuple(weight.shape))
            if not reason and not readers <= KNOWN_READERS:
                reason = f"it is read by {', '.join(sorted(readers))}"
            if reason:
                self.left[weight.name.removesuffix(TRANSPOSED_SUFFIX)] = reason
            else:
                _store_in_half(model.graph, weight)
        return ir.passes.PassResult(model, True)


def kept_whole(name: str, shape: Sequence[object]) -> str:
    """Why a checkpoint's tensor keeps its dtype; "" where it need not."""
    if len(shape) != 2:
        return "it is no matrix"
    return next((why for part, why in KEPT.items() if f".{part}." in name), "")


def _store_in_half(graph: ir.Graph, weight: ir.Value) -> None:
    wide, name, shape = weight.type, weight.name, weight.shape
    assert shape is not None
    whole: ir.Value | None = None
    for use in list(weight.uses()):
        if use.node.op_type == "Gather" and use.idx == 0:
            _cast_rows(graph, use.node, wide)
            continue
        if whole is None:
            node = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, num_outputs=1)
            graph.insert_before(graph[0], node)
            whole = node.outputs[0]
            whole.name, whole.shape, whole.type = f"{name}.float", weight.shape, wide
        use.node.replace_input_with(use.idx, whole)
    weight.type = ir.TensorType(ir.DataType.FLOAT16)
    weight.const_value = pending(ir.DataType.FLOAT16, shape, name)


def _cast_rows(graph: ir.Graph, gather: ir.Node, wide: ir.TypeProtocol | None) -> None:
    rows = gather.outputs[0]
    node = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT}, num_outputs=1)
    result = node.outputs[0]
    result.shape, result.type = rows.shape, wide
    rows.replace_all_uses_with(result)
    node.replace_input_with(0, rows)
    result.name, rows.name = rows.name, f"{rows.name}.half"
    rows.type = ir.TensorType(ir.DataType.FLOAT16)
    graph.insert_after(gather, node)
