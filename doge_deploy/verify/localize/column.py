"""One graph under test: the standard one of a layout, or a lowered one.

Axes: B rows, Q tokens of a call, K columns of the cache; see `oracle.py` for the form of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.bundle.signature import PAST_ROPE, SLOT_INDICES, SLOTS
from doge_deploy.config.model import DogeFacts
from doge_deploy.graph.stages import split_point
from doge_deploy.runtime.ort.session import open_session
from doge_deploy.targets.backend import Backend, SessionOptions
from doge_deploy.verify.cases import Call
from doge_deploy.verify.compare import Array
from doge_deploy.verify.localize.calls import CallView
from doge_deploy.verify.localize.graphs import Cut, cut, load, selection_point, tap

SETS = ("selection", "expert_selection")

Rewrite = Callable[[ir.Model], ir.Model]
"""What is done to a graph before it is run, points and all."""


@dataclass(frozen=True)
class Tapped:
    """What a run of all calls showed of some layers."""

    values: list[dict[str, Array]]
    """Per call: by point, in the form of `oracle.py`; a set as the graph gives it."""
    logits: list[Array]
    """Per call and row, as `Replay.feed` has them."""


@dataclass(frozen=True)
class Column:
    """A graph under test.

    `exact` undoes what the graph rounds on purpose (activations beside quantized weights), in cut graphs and taps, so
    that the rest can be compared with the reference.
    """

    name: str
    file: Path
    bundle: Bundle
    layout: Layout
    backend: Backend[Any]
    options: SessionOptions
    exact: Rewrite
    lower: Rewrite
    """Of `--lowering`: what makes the lowered graph of the standard one; else nothing."""

    @property
    def facts(self) -> DogeFacts:
        return self.bundle.manifest.facts

    def tapped(self, layers: Collection[int | None], calls: Sequence[Call]) -> Tapped:
        """Run all calls, and note the points of some layers."""
        model = self.exact(load(self.file))
        shown = tap(model, layers)
        data = ir.to_proto(self.lower(model)).SerializeToString()
        runner = self.backend.open(self.bundle, self.layout, self.options, graph=data)
        runner.whole_calls = True  # pieces of a call could only be joined where their form is known
        runner.reset(len(calls[0].lengths))
        values: list[dict[str, Array]] = []
        logits: list[Array] = []
        for call in calls:
            output = runner.run(call.input_ids, call.lengths.tolist())
            logits += [np.array(output[b] if runner.last_logits else output[b, :n]) for b, n in enumerate(call.lengths)]
            found: dict[str, Array] = {}
            for name, points in shown.items():
                found |= self.split(points, runner.extra[name])
            values.append(found)
        return Tapped(values, logits)

    def open_cut(self, wanted: Collection[str]) -> CutSession:
        """The points that are wanted, each computed from the points before it."""
        return CutSession(self, cut(self.exact(load(self.file)), wanted))

    def serialized(self, model: ir.Model) -> bytes:
        """A changed graph, lowered, as ONNX Runtime gets it."""
        data: bytes = ir.to_proto(self.lower(model)).SerializeToString()
        if self.bundle.manifest.dtype == "bfloat16":
            from doge_deploy.targets.ort import widen_bfloat16

            data = widen_bfloat16(data)
        return data

    def widths(self, points: Sequence[str]) -> list[int]:
        """Numbers a token has at each point."""
        facts = self.facts
        query, key = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
        by_name = {
            **dict.fromkeys(("q", "q_norm", "rope_q", "attention"), query),
            **dict.fromkeys(("k", "v", "k_norm", "rope_k"), key),
            "score": facts.num_score_heads,
            **dict.fromkeys(("gate", "up", "activation"), facts.intermediate_size),
            "router": 2 * facts.num_keys if facts.is_moe else 0,
        }
        return [by_name.get(split_point(point)[1], facts.hidden_size) for point in points]

    def split(self, points: tuple[str, ...], array: Array) -> dict[str, Array]:
        """A value of the graph as the states that it holds; a set as it is."""
        names = [split_point(point)[1] for point in points]
        if names[0] in SETS:
            return {points[0]: array}
        if array.ndim == 2:  # class logits of one token
            array = array[:, None]
        if array.ndim == 4:
            if names[0].startswith("rope") or names[0] == "score":
                array = array.swapaxes(1, 2)
            array = array.reshape(*array.shape[:2], -1)
        if len(points) == 1:
            return {points[0]: array}
        bounds = np.cumsum(self.widths(points))[:-1]
        return dict(zip(points, np.split(array, bounds, axis=-1), strict=True))

    def join(self, points: tuple[str, ...], values: Mapping[str, Array]) -> Array:
        """The inverse of `split`."""
        name, size = split_point(points[0])[1], self.facts.head_dim
        joined = np.concatenate([values[point] for point in points], axis=-1)
        if len(points) > 1:
            return joined
        if name in ("q_norm", "k_norm"):
            return joined.reshape(*joined.shape[:2], -1, size)
        if name.startswith("rope"):
            return joined.reshape(*joined.shape[:2], -1, size).swapaxes(1, 2)
        return joined.swapaxes(1, 2)[..., None] if name == "score" else joined


class CutSession:
    """A cut graph in ONNX Runtime."""

    def __init__(self, column: Column, part: Cut, *, show: Sequence[str] = ()) -> None:
        self.column = column
        self.part = part
        data = column.serialized(part.model)
        self.session = open_session(data, column.bundle.path, threads=column.options.threads, spin=False)
        self._types = {value.name: value.type for value in self.session.get_inputs()}
        self._shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self._shown = list(show)

    def feeds(self, view: CallView, caches: Mapping[str, Array], values: Mapping[str, Array]) -> dict[str, Array]:
        """What the graph is given in one call.

        Args:
            view: the call.
            caches: `key`, `value`, `score` of the layer before the call, `[B, heads, P, D or 1]`.
            values: by point.
        """
        plain = {
            "input_ids": view.ids,
            "write_indices": view.first,
            SLOT_INDICES: view.first,
            "sequence_lengths": view.lengths,
            "attention_mask": view.held.astype(np.int64),
            "position_ids": view.positions,
            PAST_ROPE: np.array([view.rope_length]),
        }
        result: dict[str, Array] = {}
        for name in self._types:
            if name in self.part.shapes:
                array = np.zeros((*view.ids.shape, sum(self.column.widths(self.part.inputs[name]))))
            elif name in self.part.inputs:
                array = self.column.join(self.part.inputs[name], values)
            elif name.startswith("past_key_values."):
                array = self._past(name, caches)
            else:
                array = plain[name]
            result[name] = np.ascontiguousarray(array.astype(_NUMPY[self._types[name]], copy=False))
        return result

    def _past(self, name: str, caches: Mapping[str, Array]) -> Array:
        """A cache in the graph's own number of slots."""
        array = caches[name.rsplit(".", 1)[1]]
        slots = self._shapes[name][2]
        if isinstance(slots, int):  # of a static cache
            grown = np.zeros((*array.shape[:2], slots, array.shape[3]), array.dtype)
            count = min(slots, array.shape[2])
            grown[:, :, :count] = array[:, :, :count]
            return grown
        sliding = self.column.facts.sliding_window
        return array[:, :, -(sliding - 1) :] if sliding and slots != SLOTS and sliding > 1 else array

    def run(self, view: CallView, caches: Mapping[str, Array], values: Mapping[str, Array]) -> dict[str, Array]:
        """What is computed at the points; a cache that holds one gives the columns of the new tokens."""
        names = list(self.part.outputs)
        results = self.session.run(names, self.feeds(view, caches, values))
        found: dict[str, Array] = {}
        for name, array in zip(names, results, strict=True):
            points = self.part.outputs[name]
            if name.startswith("present.") and selection_point(name) is None:
                width = view.ids.shape[1]
                array = np.stack([row[:, first : first + width] for row, first in zip(array, view.first, strict=True)])
            found |= self.column.split(points, array)
        return found

    def inside(self, view: CallView, caches: Mapping[str, Array], values: Mapping[str, Array]) -> dict[str, Array]:
        """Every value that was asked for with `show`, by name."""
        results = self.session.run(self._shown, self.feeds(view, caches, values))
        return dict(zip(self._shown, results, strict=True))


_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
