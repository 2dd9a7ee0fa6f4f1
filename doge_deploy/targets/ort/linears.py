"""Linear layers of one state as one product."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from doge_deploy.graph.stages import MADE_BY, mark, move, points_of
from doge_deploy.targets.ort.matching import Emitter, Linear, attribute, expect, linear_of


class PackLinearsPass(ir.passes.InPlacePass):
    """Linear layers that read the same state become one, whose output is split: query, key and value; gate and up.

    The packed weight is a Concat of the stored ones, which ONNX Runtime folds when it loads the graph: nothing is
    stored twice.

    Needs: weights as initializers, plain or quantized.
    Promises: each number of a product is the same sum; only the order in which a kernel takes it may differ.

    1. Fires on two or more layers with the same input and of one kind: quantized alike, all with a bias or none.
    2. Parts that are only concatenated again stay together.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups = [group for group in _groups(model.graph) if len(group) > 1]
        expect(bool(groups), "no two linear layers read the same state")
        for group in groups:
            _pack(group)
        return ir.passes.PassResult(model, True)


def _groups(graph: ir.Graph) -> list[list[Linear]]:
    found: dict[tuple[object, ...], list[Linear]] = {}
    for node in graph:
        linear = linear_of(node)
        if linear is not None:
            layout = {name: value.value for name, value in node.attributes.items() if name != "N"}
            key = (linear.x, node.op_type, linear.bias is None, len(linear.weights), tuple(sorted(layout.items())))
            found.setdefault(key, []).append(linear)
    return list(found.values())


def _pack(group: Sequence[Linear]) -> None:
    product = group[0].product
    emit = Emitter(product, f"{group[0].output.name}.packed")
    quantized = product.op_type == "MatMulNBits"
    # A quantized weight has a row per output, a plain one a column.
    axis = 0 if quantized else 1
    weights = [
        emit("Concat", *parts, axis=axis, name=f"weight.{index}").outputs[0]
        for index, parts in enumerate(zip(*(linear.weights for linear in group), strict=True))
    ]
    attributes = {name: value.value for name, value in product.attributes.items()}
    if quantized:
        attributes["N"] = sum(linear.width for linear in group)
    made = emit(product.op_type, group[0].x, *weights, domain=product.domain, name="product", **attributes)
    if MADE_BY in product.metadata_props:
        made.metadata_props[MADE_BY] = product.metadata_props[MADE_BY]
    packed = made.outputs[0]
    if group[0].bias is not None:
        bias = emit("Concat", *(linear.bias for linear in group), axis=0, name="bias").outputs[0]
        packed = emit("Add", packed, bias, name="sum").outputs[0]
    _split(emit, packed, _parts(group))


def _parts(group: Sequence[Linear]) -> list[tuple[ir.Value, int]]:
    """The values to be cut from the packed output, in its order, with their widths.

    Neighbours that are only read by one Concat along the last axis are one part: the output of that Concat.
    """
    parts = []
    rest = list(group)
    while rest:
        concat = _concat_of([linear.output for linear in rest])
        count = len(concat.inputs) if concat is not None else 1
        value = concat.outputs[0] if concat is not None else rest[0].output
        if concat is not None:
            mark(value, [point for joined in concat.inputs for point in points_of(joined)])
        parts.append((value, sum(linear.width for linear in rest[:count])))
        rest = rest[count:]
    return parts


def _concat_of(outputs: Sequence[ir.Value]) -> ir.Node | None:
    """A Concat of the first few of `outputs` that is their only reader."""
    uses = outputs[0].uses()
    node: ir.Node = next(iter(uses)).node
    if len(uses) != 1 or node.op_type != "Concat" or attribute(node, "axis") != -1:
        return None
    taken = list(outputs[: len(node.inputs)])
    alone = all(len(value.uses()) == 1 and not value.is_graph_output() for value in taken)
    return node if list(node.inputs) == taken and alone else None


def _split(emit: Emitter, packed: ir.Value, parts: Sequence[tuple[ir.Value, int]]) -> None:
    """Give every part its piece of `packed`."""
    if len(parts) == 1:
        move(parts[0][0], packed)
        parts[0][0].replace_all_uses_with(packed)
        return
    sizes = emit.ints(*(width for _, width in parts), name="widths")
    split = emit("Split", packed, sizes, axis=-1, outputs=len(parts), name="part")
    for (value, _), piece in zip(parts, split.outputs, strict=True):
        move(value, piece)
        value.replace_all_uses_with(piece)
