"""Lowering for ONNX Runtime's CPU provider."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

_MOVES_DATA = {
    "Cast",
    "CastLike",
    "Concat",
    "Gather",
    "Identity",
    "Reshape",
    "Shape",
    "TensorScatter",
    "Transpose",
    "Unsqueeze",
}
"""Operators that the CPU provider has in bfloat16, or that do not look at the numbers."""


def widen_bfloat16(model: Path | bytes) -> bytes:
    """A bfloat16 graph in a form that the CPU provider runs: see `WidenBfloat16Pass`. External data is left where it
    is.
    """
    loaded = ir.load(model) if isinstance(model, Path) else ir.from_proto(_parse(model))
    inlined = common.InlinePass()(loaded).model
    data: bytes = ir.to_proto(WidenBfloat16Pass()(inlined).model).SerializeToString()
    return data


def _parse(data: bytes):  # type: ignore[no-untyped-def]
    import onnx

    return onnx.load_model_from_string(data)


class WidenBfloat16Pass(ir.passes.InPlacePass):
    """Compute in float32 and round every result to bfloat16, as a bfloat16 kernel does.

    ONNX Runtime's CPU provider has no bfloat16 arithmetic (1.32: "Could not find an implementation" for Mul, MatMul,
    ...); it does the same by itself for float16. Delete this once it does so for bfloat16.

    Needs: no local functions; the dtype of every value known (shape inference is run here).
    Promises: inputs and outputs keep their names and become float32; numbers between nodes are bfloat16 numbers.

    1. Fires on nodes that read or write bfloat16, except those of `_MOVES_DATA`.
    2. Must not fire inside a node: products are summed in float32, which is what bfloat16 hardware does too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        model = common.ShapeInferencePass()(model).model
        for node in list(graph):
            if node.op_type not in _MOVES_DATA:
                self._widen(node)
        for value in list(graph.inputs):
            if value.dtype == ir.DataType.BFLOAT16:
                _narrow_input(graph, value)
        for index, value in enumerate(list(graph.outputs)):
            if value.dtype == ir.DataType.BFLOAT16:
                graph.outputs[index] = _wide_output(graph, value)
        return ir.passes.PassResult(model, True)

    def _widen(self, node: ir.Node) -> None:
        graph = node.graph
        assert graph is not None
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                cast = _cast(value, ir.DataType.FLOAT)
                graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for value in list(node.outputs):
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
                cast = _cast(value, ir.DataType.BFLOAT16)
                users = [(use.node, use.idx) for use in value.uses()]
                graph.insert_after(node, cast)
                for user, index in users:
                    if user is not cast:
                        user.replace_input_with(index, cast.outputs[0])
                if value.is_graph_output():
                    graph.outputs[list(graph.outputs).index(value)] = _renamed(value, cast.outputs[0], "unrounded")


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": to})
    node.outputs[0].dtype = to
    node.outputs[0].shape = value.shape
    return node


def _renamed(old: ir.Value, new: ir.Value, suffix: str) -> ir.Value:
    """Give `new` the name of `old`, a graph output that it replaces; `old` gets the suffix."""
    name, old.name = old.name, f"{old.name}_{suffix}"
    new.name = name
    return new


def _narrow_input(graph: ir.Graph, value: ir.Value) -> None:
    users = [(use.node, use.idx) for use in value.uses()]
    value.dtype = ir.DataType.FLOAT
    cast = _cast(value, ir.DataType.BFLOAT16)
    graph.insert_before(graph[0], cast)
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])


def _wide_output(graph: ir.Graph, value: ir.Value) -> ir.Value:
    cast = _cast(value, ir.DataType.FLOAT)
    graph.append(cast)
    return _renamed(value, cast.outputs[0], "bfloat16")
