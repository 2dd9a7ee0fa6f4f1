"""Points of a Doge in a graph: which value is the result of which stage of which layer, in every form of the graph.

The trace marks them once (`passes/mark_stages.py`), as metadata of the node that computes the value; a pass that puts
another value in the place of a marked one hands the mark on with `move`. So a point has the same name in a standard
graph, in a lowered one and in an engine's. Marks are text in `NodeProto.metadata_props`, which no runtime reads:

    doge.point.<output>   the points that this output holds, side by side along its last axis
    doge.computes         points that a fused node computes inside, and does not show
    doge.pass             the pass of a lowering that made the node, after those that made what it was made of

A point is `layers.<i>.<name>` or, outside the layers, `<name>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

POINT = "doge.point."
COMPUTES = "doge.computes"
MADE_BY = "doge.pass"

LAYER_POINTS = (
    "input_norm",
    "q",
    "k",
    "v",
    "q_norm",
    "k_norm",
    "rope_q",
    "rope_k",
    "score",
    "selection",
    "attention",
    "o_proj",
    "residual",
    "post_norm",
    "gate",
    "up",
    "activation",
    "down",
    "router",
    "expert_selection",
    "experts",
    "mlp_residual",
)
"""In the order in which a layer computes them. `selection` and `expert_selection` are sets, not numbers: they stand
inside the bodies of the `doge` operators, where `ExposeSelectionsPass` finds them, and are not marked.

`score` is that of the new tokens in a static graph, of all keys in others; `activation` is what `down` reads; `experts`
is the sum of the shared and the routed experts.
"""

FIRST_POINT = "embedding"
LAST_POINTS = ("norm", "head")

STAGES = {"rope_q": "rope", "rope_k": "rope", "mlp_residual": "residual", "expert_selection": "selection"}
"""The stage that a point belongs to, where its name is another one."""


def point_name(layer: int | None, name: str) -> str:
    return name if layer is None else f"layers.{layer}.{name}"


def split_point(point: str) -> tuple[int | None, str]:
    """Layer and name of a point."""
    if not point.startswith("layers."):
        return None, point
    _, layer, name = point.split(".")
    return int(layer), name


def stage_of(point: str) -> str:
    """The stage in the words of the model: that of `layers.3.rope_q` is `rope`."""
    name = split_point(point)[1]
    return STAGES.get(name, name)


def place(point: str) -> int:
    """Where a point stands among those of its layer; outside the layers 0."""
    name = split_point(point)[1]
    return LAYER_POINTS.index(name) if name in LAYER_POINTS else 0


def points_of(value: ir.Value | None) -> tuple[str, ...]:
    """The points that a value holds, side by side; none for most values."""
    node = None if value is None else value.producer()
    if node is None:
        return ()
    return tuple(node.metadata_props.get(f"{POINT}{value.index()}", "").split())  # type: ignore[union-attr]


def mark(value: ir.Value, points: Iterable[str]) -> None:
    """Say that `value`, the output of a node, holds these points; none takes the mark off."""
    node, text = value.producer(), " ".join(points)
    assert node is not None
    if text:
        node.metadata_props[f"{POINT}{value.index()}"] = text
    else:
        node.metadata_props.pop(f"{POINT}{value.index()}", None)


def move(old: ir.Value, new: ir.Value) -> None:
    """`new` holds the points that `old` held, which holds none any more."""
    points = points_of(old)
    if points:
        mark(old, ())
        mark(new, points)


def marked(model: ir.Model) -> Iterator[tuple[ir.Value, tuple[str, ...]]]:
    """Every value of a graph that holds points, in the order of the graph."""
    for node in model.graph:
        for value in node.outputs:
            points = points_of(value)
            if points:
                yield value, points


def computed(node: ir.Node) -> tuple[str, ...]:
    """All points that a node computes: those that its outputs hold, and those that it has inside."""
    inside = node.metadata_props.get(COMPUTES, "").split()
    held = [point for value in node.outputs for point in points_of(value)]
    return tuple(dict.fromkeys([*inside, *held]))
