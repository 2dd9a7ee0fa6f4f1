"""A graph with its points shown, and a graph cut apart at its points."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.passes.expose_selections import ExposeSelectionsPass, selecting
from doge_deploy.graph.stages import MADE_BY, marked, point_name, split_point

_FLOATS_OF_SCORES = ir.DataType.FLOAT

SELECTIONS = {"kept": "selection", "experts": "expert_selection"}
"""By name of an exposed output, without its layer: the point."""

INPUT = "point:"
"""Before the name of a value that is given to a cut graph."""


@dataclass(frozen=True)
class Cut:
    """Some points of a graph, each computed from the points before it, which are inputs."""

    model: ir.Model
    inputs: dict[str, tuple[str, ...]]
    """Points of each new graph input, side by side."""
    outputs: dict[str, tuple[str, ...]]
    """Points of each graph output, in the order of `model.graph.outputs`."""
    shapes: frozenset[str]
    """New graph inputs of which only the shape is read."""

    def weights(self) -> list[ir.Value]:
        """Initializers that are left, those of constants excepted."""
        return [value for value in self.model.graph.initializers.values() if value.uses()]

    def makers(self) -> list[str]:
        """Passes of a lowering that made what is left."""
        made = (name for node in self.model.graph for name in node.metadata_props.get(MADE_BY, "").split())
        return list(dict.fromkeys(made))


def load(path: Path) -> ir.Model:
    """A graph whose points are marked, its selections shown as outputs `kept.<i>` and `experts.<i>`.

    Raises:
        UnsupportedModelError: an older version wrote the graph, and marked no points in it.
    """
    model = ir.load(path)
    if next(marked(model), None) is None:
        raise UnsupportedModelError(
            f"{path} does not say which value is the result of which stage: it was exported by an older version of "
            "doge-deploy; export the checkpoint again"
        )
    if model.functions:
        operators = selecting(model)
        if operators:
            ExposeSelectionsPass(operators)(model)
    else:
        for value in [value for node in model.graph for value in node.outputs]:
            kind, _, layer = (value.name or "").partition(".")
            if kind in SELECTIONS and layer.isdigit() and value not in model.graph.outputs:
                value.dtype = ir.DataType.BOOL if kind == "kept" else ir.DataType.INT64
                model.graph.outputs.append(value)
    for value, _ in marked(model):
        if value.dtype is None:
            value.dtype = _dtype(model, value)
    return model


def _dtype(model: ir.Model, value: ir.Value) -> ir.DataType:
    """What a fused node gives: the dtype of the model."""
    dtype = model.graph.outputs[0].dtype
    return _FLOATS_OF_SCORES if dtype is None else dtype


def _known(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None  # `load` sees to it
    return value.dtype


def selection_point(name: str) -> str | None:
    """The point of an output `kept.<i>` or `experts.<i>`; None for another name."""
    kind, _, layer = name.partition(".")
    return point_name(int(layer), SELECTIONS[kind]) if kind in SELECTIONS and layer.isdigit() else None


def tap(model: ir.Model, layers: Collection[int | None]) -> dict[str, tuple[str, ...]]:
    """Give the graph its points of some layers (None: outside the layers) as further outputs, in place.

    Returns the points of each further output. What is an output already, such as a cache, is not tapped.
    """
    outputs = model.graph.outputs
    kept: dict[str, tuple[str, ...]] = {}
    for value in list(outputs):
        point = selection_point(value.name or "")
        if point is None:
            continue
        if split_point(point)[0] in layers:
            kept[str(value.name)] = (point,)
        else:
            outputs.remove(value)
    for value, points in marked(model):
        if not value.is_graph_output() and {split_point(point)[0] for point in points} & set(layers):
            outputs.append(value)
            kept[str(value.name)] = points
    return kept


def cut(model: ir.Model, wanted: Collection[str]) -> Cut:
    """Cut a graph apart at all of its points and keep what computes those that are wanted, in place.

    Every reader of a point reads a graph input instead. Points that one node computes together are given apart, so a
    node that computes two has both as outputs.
    """
    graph = model.graph
    points = dict(marked(model))
    selections = [value for value in graph.outputs if selection_point(value.name or "")]
    inputs: dict[str, tuple[str, ...]] = {}
    outputs: list[tuple[ir.Value, tuple[str, ...]]] = []
    for value, names in points.items():
        given = ir.Value(name=f"{INPUT}{value.name}", shape=value.shape, type=ir.TensorType(_known(value)))
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, given)
        if given.uses():
            graph.inputs.append(given)
            inputs[str(given.name)] = names
        if set(names) & set(wanted):
            outputs.append((value, names))
    for value in selections:
        point = selection_point(value.name or "")
        if point in wanted:
            outputs.append((value, (str(point),)))
    graph.outputs.clear()
    graph.outputs.extend(value for value, _ in outputs)
    model = common.RemoveUnusedNodesPass()(model).model
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
        inputs.pop(str(value.name), None)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    readers = {str(value.name): {use.node.op_type for use in value.uses()} for value in graph.inputs}
    shapes = frozenset(name for name in inputs if readers[name] == {"Shape"})
    return Cut(model, inputs, {str(value.name): names for value, names in outputs}, shapes)


def slice_of(path: Path, point: str) -> Cut:
    """What of a graph computes one point, from the points before it."""
    return cut(load(path), {point})


def show_all(part: Cut) -> list[ir.Value]:
    """Give a cut graph all of its values as outputs, in place, its functions inlined; returns them in order."""
    model = common.InlinePass()(part.model).model
    graph = model.graph
    shown = []
    for node in graph:
        for value in node.outputs:
            if value.name and not value.is_graph_output() and node.op_type != "Constant":
                graph.outputs.append(value)
            if value.name and node.op_type != "Constant":
                shown.append(value)
    return shown
