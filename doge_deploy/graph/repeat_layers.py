"""A trace of four layers made as long as the model: the layers between the first and the last are alike.

A trace is the slow part of an export and takes longer the more layers there are. So four are traced, and the third of
them is repeated. What comes out is what a trace of all layers gives, to the byte: the exporter numbers values by how
often it met an operator, so the names of a layer follow from those of the two before it. Where a trace is not of that
form, `repeat_layers` says so, and all layers have to be traced.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, MutableSequence, Sequence

import onnx_ir as ir

TRACED_LAYERS = 4
"""The first layer, two that are compared, and the last, which selects the tokens that the head needs."""

_NUMBERED = re.compile(r"(.*)_(\d+)")
_OF_LAYER = re.compile(r"((?:model[._]layers|past_key_values)[._])(\d+)(?=[._])")


class UnlikeLayersError(Exception):
    """The layers of a trace differ in more than their numbers."""


def repeat_layers(model: ir.Model, layers: int) -> None:
    """Make a trace of `TRACED_LAYERS` layers one of `layers` layers, in place.

    Args:
        model: what the exporter gave, before any pass and before inputs and outputs were renamed.
        layers: at least `TRACED_LAYERS`.

    Raises:
        UnlikeLayersError: the layers are not alike; the model is as it was.
    """
    nodes = list(model.graph)
    starts = [_start(nodes, layer) for layer in range(1, TRACED_LAYERS)]
    if starts != sorted(starts):
        raise UnlikeLayersError("the layers do not follow one another")
    earlier, template, tail = nodes[starts[0] : starts[1]], nodes[starts[1] : starts[2]], nodes[starts[2] :]
    names = _Names(earlier, template)
    _check_alike(model.graph, names, earlier, template)
    _check_tail(earlier, tail)
    _repeat(model.graph, names, earlier, template, tail, layers - TRACED_LAYERS)


def _start(nodes: Sequence[ir.Node], layer: int) -> int:
    """Where a layer begins: at the node that uses the weight of its first norm."""
    name = f"model.layers.{layer}.input_layernorm.weight"
    for index, node in enumerate(nodes):
        if any(value is not None and value.name == name for value in node.inputs):
            return index
    raise UnlikeLayersError(f"no node uses {name}")


class _Names:
    """How the names of one layer follow from those of another."""

    def __init__(self, earlier: Sequence[ir.Node], later: Sequence[ir.Node]) -> None:
        self._strides: dict[str, int] = {}
        """How many values of each stem a layer has: `linear` is the stem of `linear_17`."""
        for one, other in zip(_outputs(earlier), _outputs(later), strict=False):
            (stem, first), (same, second) = _number(one.name), _number(other.name)
            if stem != same or self._strides.setdefault(stem, second - first) != second - first:
                raise UnlikeLayersError(f"the numbers of {one.name} and {other.name} do not follow those before")

    def moved(self, name: str | None, layers: int) -> str:
        """The name of the same value `layers` layers later."""
        assert name is not None
        if _OF_LAYER.search(name):
            return _OF_LAYER.sub(lambda found: f"{found[1]}{int(found[2]) + layers}", name)
        stem, number = _number(name)
        return f"{stem}_{number + layers * self._strides[stem]}" if stem in self._strides else name


def _number(name: str | None) -> tuple[str, int]:
    """`linear_17` -> `linear`, 17; the first one has no number."""
    assert name is not None
    found = _NUMBERED.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, 0)


def _outputs(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


def _is_of_layer(value: ir.Value) -> bool:
    """Whether it is a weight or a cache of one layer."""
    return value.producer() is None and _OF_LAYER.search(str(value.name)) is not None


def _check_alike(graph: ir.Graph, names: _Names, earlier: Sequence[ir.Node], template: Sequence[ir.Node]) -> None:
    """The second layer, moved by one, is the third.

    Raises:
        UnlikeLayersError: it is not.
    """
    if len(earlier) != len(template):
        raise UnlikeLayersError(f"{len(earlier)} nodes in one layer, {len(template)} in the next")
    ends = set(graph.outputs)
    counterparts = dict(zip(_outputs(earlier), _outputs(template), strict=True))

    def alike(one: ir.Value | None, other: ir.Value | None) -> bool:
        """Inputs: the same value, or one of the same layer, or what the layer before hands on."""
        if one is None or other is None or one is other:
            return one is other
        if one in counterparts:
            return counterparts[one] is other
        handed_on = other in counterparts and one.producer() is not None
        return (handed_on or (_is_of_layer(one) and _is_of_layer(other))) and names.moved(one.name, 1) == other.name

    def described(node: ir.Node) -> tuple[object, ...]:
        # the axes of a cache have names of their own in each layer, until the signature names them
        results = [(value.dtype, None if value in ends else str(value.shape)) for value in node.outputs]
        attributes = {name: str(attribute) for name, attribute in node.attributes.items()}
        return node.domain, node.op_type, node.overload, len(node.inputs), results, attributes

    for one, other in zip(earlier, template, strict=True):
        if described(one) != described(other) or not all(map(alike, one.inputs, other.inputs)):
            raise UnlikeLayersError(f"{one.name} and {other.name} differ in more than their numbers")
        if [value in ends for value in one.outputs] != [value in ends for value in other.outputs]:
            raise UnlikeLayersError(f"of {one.name} and {other.name} one alone is an output")


def _check_tail(earlier: Sequence[ir.Node], tail: Sequence[ir.Node]) -> None:
    """What follows uses nothing of the layers but of the one right before it, and what all of them use.

    Raises:
        UnlikeLayersError: it does.
    """
    further_back = set(_outputs(earlier))
    for node in tail:
        for value in node.inputs:
            if value in further_back:
                raise UnlikeLayersError(f"{node.name} uses {value.name}, which is not of the layer before")


def _repeat(
    graph: ir.Graph,
    names: _Names,
    earlier: Sequence[ir.Node],
    template: Sequence[ir.Node],
    tail: Sequence[ir.Node],
    added: int,
) -> None:
    copies: list[dict[ir.Value, ir.Value]] = []
    """Per new layer: values of the template -> their copies."""
    before = dict(zip(_outputs(earlier), _outputs(template), strict=True))
    nodes = []
    for layers in range(1, added + 1):
        copied: dict[ir.Value, ir.Value] = {}
        for node in template:
            for value in node.inputs:
                if value is not None and value not in copied and _is_of_layer(value):
                    copied[value] = _copy(value, names, layers)
            inputs = [value and (copied.get(value) or before.get(value) or value) for value in node.inputs]
            for value in node.outputs:
                copied[value] = _copy(value, names, layers)
            outputs = [copied[value] for value in node.outputs]
            attributes = list(node.attributes.values())
            nodes.append(
                ir.Node(node.domain, node.op_type, inputs, attributes, overload=node.overload, outputs=outputs)
            )
        copies.append(copied)
        before = {one: copied[other] for one, other in zip(_outputs(earlier), _outputs(template), strict=True)}
    _insert(graph.inputs, copies)
    _insert(graph.outputs, copies)
    initializers = list(graph.initializers.values())
    _insert(initializers, copies)
    graph.initializers.clear()
    if copies:
        graph.insert_before(tail[0], nodes)
        for node in tail:
            for index, value in enumerate(node.inputs):
                if value is not None and value in copies[-1] and not _is_of_layer(value):
                    node.replace_input_with(index, copies[-1][value])
    for value in _of_the_last_layer(tail):
        value.name = names.moved(value.name, added)
        _move_metadata(value, names, added)
    for value in initializers:
        graph.initializers.add(value)


def _insert(values: MutableSequence[ir.Value], copies: Sequence[dict[ir.Value, ir.Value]]) -> None:
    """Put the copies of each layer behind those that they are copies of."""
    own = [index for index, value in enumerate(values) if copies and value in copies[0]]
    if own:
        found = [values[index] for index in own]
        for offset, value in enumerate((copied[value] for copied in copies for value in found), own[-1] + 1):
            values.insert(offset, value)


def _of_the_last_layer(tail: Sequence[ir.Node]) -> list[ir.Value]:
    """What has to be called otherwise: all that the last nodes make, and the weights and caches of the last layer."""
    used = (value for node in tail for value in node.inputs if value is not None and _is_of_layer(value))
    return [*dict.fromkeys(used), *_outputs(tail)]


def _copy(value: ir.Value, names: _Names, layers: int) -> ir.Value:
    name = names.moved(value.name, layers)
    shape = None if value.shape is None else value.shape.copy()
    data = copy.copy(value.const_value)  # of a weight: its shape alone, a trace has no numbers
    if data is not None:
        data.name = name
    copied = ir.Value(name=name, shape=shape, type=value.type, const_value=data)
    copied.metadata_props.update(value.metadata_props)
    _move_metadata(copied, names, layers)
    return copied


def _move_metadata(value: ir.Value, names: _Names, layers: int) -> None:
    for key, text in value.metadata_props.items():
        value.metadata_props[key] = names.moved(text, layers)
