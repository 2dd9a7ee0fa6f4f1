"""Which stage of two graphs differs on the same input, and which pass made the nodes that differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from doge_deploy.config.model import DogeFacts
from doge_deploy.graph.stages import FIRST_POINT, LAST_POINTS, LAYER_POINTS, MADE_BY, point_name, split_point
from doge_deploy.verify.cases import Call
from doge_deploy.verify.compare import Array, difference
from doge_deploy.verify.localize.calls import CallView
from doge_deploy.verify.localize.column import SETS, Column
from doge_deploy.verify.localize.graphs import Cut, cut, load
from doge_deploy.verify.localize.shapes import fitted
from doge_deploy.verify.tolerance import ULP

ULPS = 64
"""Units in the last place, of a stage's largest number, that two forms of a stage may differ by: they add up in another
order."""

Arrays = dict[str, Array]


@dataclass(frozen=True)
class StageDifference:
    """The first stage that gives other numbers in two graphs on the same input."""

    call: int
    point: str
    amount: float


def stage_differences(
    good: Column, bad: Column, standard: Column, views: Sequence[CallView], calls: Sequence[Call], *, static: bool
) -> list[StageDifference]:
    """Compare two graphs stage by stage, on the numbers that `standard` shows.

    `standard` is GOOD's standard graph, in which every point is shown.
    """
    facts = standard.facts
    found: list[StageDifference] = []
    layers: list[int | None] = [None, *range(facts.num_hidden_layers)]
    columns = max(view.columns for view in views)
    carried: list[Arrays] = [{} for _ in views]
    for layer in [*layers[1:], None]:
        shown = standard.tapped([layer, None] if layer is not None else [None], calls).values
        names = LAYER_POINTS if layer is not None else (FIRST_POINT, *LAST_POINTS)
        wanted = {point_name(layer, name) for name in names}
        one, two = good.open_cut(wanted), bad.open_cut(wanted)
        if layer is None:
            shown = [{**before, **now} for before, now in zip(carried, shown, strict=True)]
        cache = _empty(facts, len(views[0].ids), columns if static else 0)
        for index, view in enumerate(views):
            values = {**carried[index], **shown[index]}
            results = [session.run(view, cache, fitted(values, shown[index], view)) for session in (one, two)]
            found += _compare(index, results[0], results[1], good.bundle.manifest.dtype)
            if layer is not None:
                cache = _advanced(cache, layer, values, view, facts, static=static)
                carried[index] = values
    return sorted(found, key=_order)


def _order(item: StageDifference) -> tuple[int, float, int]:
    layer, name = split_point(item.point)
    outside = -1.0 if name == "embedding" else float("inf")
    place = LAYER_POINTS.index(name) if name in LAYER_POINTS else 0
    return item.call, outside if layer is None else layer, place


def _compare(call: int, one: Arrays, two: Arrays, dtype: str) -> list[StageDifference]:
    found = []
    for point in one.keys() & two.keys():
        a, b = one[point], two[point]
        if split_point(point)[1] in SETS:
            width = min(a.shape[-1], b.shape[-1])
            same = (
                np.array_equal(np.sort(a, -1), np.sort(b, -1))
                if a.dtype != bool
                else np.array_equal(a[..., :width], b[..., :width])
            )
            if not same:
                found.append(StageDifference(call, point, float("inf")))
            continue
        if a.shape != b.shape:
            found.append(StageDifference(call, point, float("inf")))
            continue
        amount = difference(list(b), list(a))
        if amount.non_finite or amount.max_abs > ULPS * ULP[dtype] * amount.scale:
            found.append(StageDifference(call, point, amount.max_abs))
    return found


def _empty(facts: DogeFacts, batch: int, columns: int) -> Arrays:
    pair = np.zeros((batch, facts.num_key_value_heads, columns, facts.head_dim), np.float32)
    return {"key": pair, "value": pair, "score": np.zeros((batch, facts.num_score_heads, columns, 1), np.float32)}


def _advanced(cache: Arrays, layer: int, values: Arrays, view: CallView, facts: DogeFacts, *, static: bool) -> Arrays:
    """What a layer holds after a call, of the points that were shown."""
    size = facts.head_dim
    new = {
        "key": _heads(values[point_name(layer, "rope_k")], size),
        "value": _heads(values[point_name(layer, "v")], size),
        "score": values[point_name(layer, "score")].swapaxes(1, 2)[..., None],
    }
    if not static:
        grown = {kind: np.concatenate((cache[kind], new[kind]), axis=2) for kind in ("key", "value")}
        return {**grown, "score": new["score"]}
    result = {kind: array.copy() for kind, array in cache.items()}
    for kind, array in new.items():
        for b, first in enumerate(view.first):
            result[kind][b, :, first : first + array.shape[2]] = array[b]
    return result


def _heads(array: Array, size: int) -> Array:
    return array.reshape(*array.shape[:2], -1, size).swapaxes(1, 2)


STAGES_ASKED = 12
"""How many of the stages that differ are asked which passes made them."""


def guilty_pass(good: Column, bad: Column, points: Sequence[str]) -> str | None:
    """The pass that explains all stages that differ, the first of which is the first of `points`.

    A node that a pass made of another pass's node names both. Where the fault is of the earlier pass, stages that the
    later one left alone differ too, and name the earlier one alone; where none does, it is the later one.
    """
    first, *others = (_makers(good, bad, point) for point in points[:STAGES_ASKED])
    common = [name for name in first if all(name in names for names in others if names)]
    return next(iter((common or first)[::-1]), None)


def _makers(good: Column, bad: Column, point: str) -> list[str]:
    """Passes that made the nodes by which a stage of BAD's graph differs from GOOD's, the first pass first."""
    one, two = (cut(load(column.file), {point}) for column in (good, bad))
    known, found = _signatures(one), _signatures(two)
    here = [node for node, text in found if text not in {other for _, other in known}]
    gone = [node for node, text in known if text not in {other for _, other in found}]
    fresh = _roots(here) or _roots(gone)
    return list(dict.fromkeys(name for node in fresh for name in node.metadata_props.get(MADE_BY, "").split()))


def _roots(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Those that no other of them comes before: the rest differ only because these do."""
    made = {value for node in nodes for value in node.outputs}
    return [node for node in nodes if not any(value in made for value in node.inputs)]


def _signatures(part: Cut) -> list[tuple[ir.Node, str]]:
    """What each node computes, in a hash: its operator, its attributes, and the same of all that it reads."""
    texts: dict[ir.Value, str] = {}
    for value in part.model.graph.inputs:
        texts[value] = " ".join(part.inputs.get(str(value.name), (str(value.name),)))
    for name, value in part.model.graph.initializers.items():
        texts[value] = _stored(name, value)
    bodies = {key: str(ir.to_proto(function).SerializeToString()) for key, function in part.model.functions.items()}
    result = []
    for node in part.model.graph:
        inputs = [texts.get(value, "?") if value is not None else "" for value in node.inputs]
        attributes = sorted((name, _attribute(one)) for name, one in node.attributes.items())
        body = bodies.get(node.op_identifier(), "")
        text = hashlib.sha256(repr((node.domain, node.op_type, attributes, inputs, body)).encode()).hexdigest()
        result.append((node, text))
        for value in node.outputs:
            texts[value] = f"{text}.{value.index()}"
    return result


def _stored(name: str, value: ir.Value) -> str:
    tensor = value.const_value
    return f"{name}@{tensor.offset}" if isinstance(tensor, ir.ExternalTensor) else name


def _attribute(one: Any) -> str:
    value = one.value
    return repr(value.numpy().tolist()) if hasattr(value, "numpy") else repr(value)
