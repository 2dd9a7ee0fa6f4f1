"""Linear layers of one state as one product."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from doge_deploy.targets.ort.matching import Emitter, Linear, attribute, expect


class PackLinearsPass(ir.passes.InPlacePass):
    """Linear layers that read the same state become one, whose output is split: query, key and value; gate and up.

    The packed weight is a Concat of the stored ones, which ONNX Runtime folds when it loads the graph: nothing is
    stored twice.

    Needs: weights `[in, out]` as initializers.
    Promises: each number of a product is the same sum; only the order in which a kernel takes it may differ.

    1. Fires on two or more layers with the same input, all with a bias or all without one.
    2. Parts that are only concatenated again stay together.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups = [group for group in _groups(model.graph) if len(group) > 1]
        expect(bool(groups), "no two linear layers read the same state")
        for group in groups:
            _pack(group)
        return ir.passes.PassResult(model, True)


def _groups(graph: ir.Graph) -> list[list[Linear]]:
    found: dict[tuple[ir.Value, bool], list[Linear]] = {}
    for node in graph:
        linear = _linear(node)
        if linear is not None:
            found.setdefault((linear.x, linear.bias is None), []).append(linear)
    return list(found.values())


def _linear(node: ir.Node) -> Linear | None:
    """The linear layer whose product `node` is."""
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    x, weight = node.inputs
    if x is None or weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
        return None
    output = node.outputs[0]
    users = [use.node for use in output.uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        bias = users[0].inputs[1]
        if bias is not None and bias.is_initializer() and bias.shape is not None and len(bias.shape) == 1:
            return Linear(x, weight, bias, users[0].outputs[0])
    return Linear(x, weight, None, output)


def _pack(group: Sequence[Linear]) -> None:
    first = group[0].output.producer()
    assert first is not None
    if group[0].bias is not None:
        product = first.inputs[0]
        assert product is not None
        first = product.producer()
        assert first is not None
    emit = Emitter(first, f"{group[0].output.name}.packed")
    weight = emit("Concat", *(linear.weight for linear in group), axis=1, name="weight").outputs[0]
    packed = emit("MatMul", group[0].x, weight, name="product").outputs[0]
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
        parts[0][0].replace_all_uses_with(packed)
        return
    sizes = emit.ints(*(width for _, width in parts), name="widths")
    split = emit("Split", packed, sizes, axis=-1, outputs=len(parts), name="part")
    for (value, _), piece in zip(parts, split.outputs, strict=True):
        value.replace_all_uses_with(piece)
