"""The norms of queries and keys in an engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from doge_deploy.graph.stages import marked, move, point_name, split_point

HEADS = 2
"""The axis of heads in what is normalised, `[B, Q, heads, D]`."""


class OneHeadNormPass(ir.passes.InPlacePass):
    """Normalise queries and keys of a layer by one node.

    Needs: functions inlined, stages marked. Promises: each number is that of the two norms, which round before they
    multiply with their weights, as this does.

    The kernels of TensorRT are source text, each with 130 kB of the same functions before its own, and those of a norm
    are stored again for each layer: one kernel less is 2 MB less in an engine of eight layers, and one start less in
    each of them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        norms = {
            points[0]: value.producer()
            for value, points in marked(model)
            if len(points) == 1 and split_point(points[0])[1] in ("q_norm", "k_norm")
        }
        modified = False
        for point, query in norms.items():
            layer, name = split_point(point)
            key = norms.get(point_name(layer, "k_norm"))
            if name == "q_norm" and query is not None and key is not None and _is_pair(query, key):
                _join(query, key)
                modified = True
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


def _is_pair(query: ir.Node, key: ir.Node) -> bool:
    """Whether both are norms of heads, and alike except in the number of heads and the weights."""
    return (
        query.op_type == key.op_type == "RMSNormalization"
        and query.attributes == key.attributes
        and _heads(query) > 0
        and _heads(key) > 0
        and _size(query) == _size(key)
        and query.inputs[0].dtype == key.inputs[0].dtype  # type: ignore[union-attr]
    )


def _heads(norm: ir.Node) -> int:
    """How many there are; 0 where that is not known."""
    states = norm.inputs[0]
    known = states is not None and states.shape is not None and len(states.shape) == 4
    heads = states.shape[HEADS] if known else 0  # type: ignore[union-attr,index]
    return heads if isinstance(heads, int) else 0


def _size(norm: ir.Node) -> int | None:
    weight = norm.inputs[1]
    return None if weight is None or weight.shape is None else int(weight.shape[0])  # type: ignore[arg-type]


def _join(query: ir.Node, key: ir.Node) -> None:
    graph, pair = query.graph, (query, key)
    assert isinstance(graph, ir.Graph)
    size, dtype, heads = _size(query), query.inputs[0].dtype, [_heads(norm) for norm in pair]  # type: ignore[union-attr]
    assert size is not None and dtype is not None

    def emit(op_type: str, inputs: Sequence[ir.Value | None], outputs: int = 1, **attributes: object) -> list[ir.Value]:
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs)  # type: ignore[arg-type]
        graph.insert_before(query, node)
        return list(node.outputs)

    states = emit("Concat", [norm.inputs[0] for norm in pair], axis=HEADS)
    ones = emit("Constant", [], value=ir.tensor(np.ones(size, dtype.numpy())))
    (normed,) = emit("RMSNormalization", [*states, *ones])
    assert normed.producer() is not None
    normed.producer().attributes.update(query.attributes)  # type: ignore[union-attr]
    weights = []
    for norm, count in zip(pair, heads, strict=True):
        shape = emit("Constant", [], value_ints=[count, size])
        weights += emit("Expand", [norm.inputs[1], *shape])
    scaled = emit("Mul", [normed, *emit("Concat", weights, axis=0)])
    parts = emit("Split", [*scaled, *emit("Constant", [], value_ints=heads)], outputs=2, axis=HEADS)
    for norm, part in zip(pair, parts, strict=True):
        old = norm.outputs[0]
        part.shape, part.type = old.shape, old.type
        move(old, part)
        old.replace_all_uses_with(part, replace_graph_outputs=True)
        part.name, old.name = old.name, None
        graph.remove(norm, safe=True)
