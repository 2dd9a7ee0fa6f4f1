"""Why a stage errs: its weights, its inputs, what it chose, or the first number inside it that cannot be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from doge_deploy.bundle.files import WEIGHTS_FILE
from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint.names import HEAD
from doge_deploy.graph.stages import computed, marked, point_name, split_point
from doge_deploy.graph.weight_file import read_weight_file
from doge_deploy.verify.compare import Array
from doge_deploy.verify.localize.calls import CallView
from doge_deploy.verify.localize.column import Column, CutSession
from doge_deploy.verify.localize.finding import Choice, Measure, Reading
from doge_deploy.verify.localize.graphs import Cut, cut, load, show_all
from doge_deploy.verify.localize.walk import Arrays

WEIGHTS = {
    "embedding": ("model.embed_tokens.weight",),
    "input_norm": ("input_layernorm.weight",),
    "q": ("self_attn.q_proj.weight", "self_attn.q_proj.bias"),
    "k": ("self_attn.k_proj.weight", "self_attn.k_proj.bias"),
    "v": ("self_attn.v_proj.weight", "self_attn.v_proj.bias"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "score": ("self_attn.dt_proj.weight", "self_attn.A", "self_attn.dt_proj.bias"),
    "o_proj": ("self_attn.o_proj.weight", "self_attn.o_proj.bias"),
    "residual": ("input_residual",),
    "post_norm": ("post_attention_layernorm.weight",),
    "gate": ("mlp.gate_proj.weight", "mlp.gate_proj.bias"),
    "up": ("mlp.up_proj.weight", "mlp.up_proj.bias"),
    "down": ("mlp.down_proj.weight", "mlp.down_proj.bias"),
    "router": ("mlp.router_gate.weight",),
    "experts": ("mlp.down_embed.weight", "mlp.up_embed.weight"),
    "mlp_residual": ("post_attention_residual",),
    "norm": ("model.norm.weight",),
    "head": (HEAD, "model.embed_tokens.weight", "score.weight"),
}
"""The tensors that a stage computes with, by point; those of a layer without their prefix."""

INPUTS = {
    "q": ("input_norm",),
    "k": ("input_norm",),
    "v": ("input_norm",),
    "q_norm": ("q",),
    "k_norm": ("k",),
    "score": ("v",),
    "o_proj": ("attention",),
    "residual": ("x", "o_proj"),
    "post_norm": ("residual",),
    "gate": ("post_norm",),
    "up": ("post_norm",),
    "activation": ("gate", "up"),
    "down": ("activation",),
    "router": ("post_norm",),
    "experts": ("down", "post_norm", "router"),
    "head": ("norm",),
}
"""The points that a stage reads, where no form of the graph reads others: fused nodes reach further back."""

HALF_MAX = 65504.0
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}
"""Smallest normal number."""


@dataclass(frozen=True)
class Reason:
    word: str
    detail: str


class Examiner:
    """Looks at one stage that errs.

    Args:
        bundle: what is judged.
        weight_failures: what `compare_weights` found.
    """

    def __init__(self, bundle: Bundle, weight_failures: Sequence[str]) -> None:
        self.bundle = bundle
        self.weight_failures = weight_failures
        self.layers = bundle.manifest.facts.num_hidden_layers

    def reason(
        self,
        reading: Reading,
        column: Column,
        view: CallView,
        caches: Mapping[str, Array],
        values: Arrays,
    ) -> Reason:
        """Why the stage of `reading` errs in `column`, run on `values` (by point) with `caches`."""
        if isinstance(reading.own, Choice):
            return _of_choice(reading.own)
        part = cut(column.exact(load(column.file)), {reading.point})
        found = self._weights(reading.point, part) or self._inputs(reading.point, part)
        if found is not None:
            scanned = self._scan(reading, column, part, view, caches, values)
            if found.word == "wrong weight" and scanned is not None and scanned.word == "NaN origin":
                return Reason(scanned.word, f"{scanned.detail}; {found.detail}")
            return found
        assert isinstance(reading.own, Measure)
        scanned = self._scan(reading, column, part, view, caches, values)
        return scanned or Reason("other arithmetic", _pattern(reading.own))

    def _weights(self, point: str, part: Cut) -> Reason | None:
        """A weight that is not the checkpoint's, or not the stage's."""
        initializers = part.weights()
        names = [str(value.name) for value in initializers]
        for failure in self.weight_failures:
            tensor = failure.split(":")[0].split(" ")[0]
            if any(name == tensor or name.startswith(f"{tensor}.") for name in names):
                return Reason("wrong weight", f"{WEIGHTS_FILE}: {failure}")
        moved = self._moved(initializers)
        if moved is not None:
            return Reason("wrong weight", moved)
        layer, name = split_point(point)
        wanted = WEIGHTS.get(name, ())
        prefix = "" if layer is None else f"model.layers.{layer}."
        if wanted and not any(found.startswith(prefix + tensor) for found in names for tensor in wanted):
            reads = ", ".join(names) or "none"
            return Reason("wrong weight", f"the graph does not read {prefix}{wanted[0]} here; it reads {reads}")
        return None

    def _moved(self, initializers: Sequence[ir.Value]) -> str | None:
        """An initializer that lies elsewhere in the weight file than the tensor that it is called after."""
        stored = read_weight_file(self.bundle.path)
        for value in initializers:
            tensor, info = value.const_value, stored.get(str(value.name))
            if isinstance(tensor, ir.ExternalTensor) and info is not None and tensor.offset != info.offset:
                other = next((name for name, one in stored.items() if one.offset == tensor.offset), "other bytes")
                return f"{value.name} is read from the place of {other} in {WEIGHTS_FILE}"
        return None

    def _inputs(self, point: str, part: Cut) -> Reason | None:
        """A point that the stage reads and should not, or the other way round."""
        layer, name = split_point(point)
        if name not in INPUTS:
            return None
        makers = [value.producer() for value, points in marked(part.model) if point in points]
        if any(len(computed(node)) > 1 for node in makers if node is not None):
            return None  # computed together with others: what it reads is also theirs
        held = {one for name, points in part.inputs.items() if name not in part.shapes for one in points}
        own = {split_point(one)[1] for one in held if split_point(one)[0] == layer}
        state = {"mlp_residual", "embedding"} & {
            split_point(one)[1] for one in held - {point_name(layer, n) for n in own}
        }
        read = own | ({"x"} if state else set())
        wanted = set(INPUTS[name])
        together = {"q", "k", "q_norm", "k_norm"} if name.endswith("_norm") else set()  # in one value
        strange, missing = read - wanted - together, wanted - read
        if strange and missing:
            return Reason("wrong input", f"it reads {_words(strange)} instead of {_words(missing)}")
        return Reason("wrong input", f"it does not read {_words(missing)}") if missing else None

    def _scan(
        self,
        reading: Reading,
        column: Column,
        part: Cut,
        view: CallView,
        caches: Mapping[str, Array],
        values: Arrays,
    ) -> Reason | None:
        """The first value inside the stage that is not finite, too large or too small for the dtype."""
        assert isinstance(reading.own, Measure)
        dtype = self.bundle.manifest.dtype
        given = [values[one] for points in part.inputs.values() for one in points if one in values]
        finite_input = all(np.isfinite(array).all() for array in given)
        shown = show_all(part)
        session = CutSession(column, part, show=[str(value.name) for value in shown])
        inside = session.inside(view, caches, values)
        floats = {name: array for name, array in inside.items() if np.issubdtype(array.dtype, np.floating)}
        if reading.own.difference.non_finite and finite_input:
            for value in shown:
                array = floats.get(str(value.name))
                if array is None or np.isfinite(array).all():
                    continue
                return _not_finite(value, array, floats, dtype)
        for value in shown:
            array = floats.get(str(value.name))
            if array is None or reading.own.difference.non_finite:
                continue
            nonzero = np.abs(array[array != 0])
            share = float((nonzero < SMALLEST[dtype]).mean()) if nonzero.size else 0.0
            lost = _lost(value, array, floats)
            if share > 0.5 or lost:
                return Reason(
                    "denormal", f"{_node(value)} gives numbers below {SMALLEST[dtype]:.2g}, which lose digits"
                )
        return None


def _of_choice(choice: Choice) -> Reason:
    word = "tie" if choice.violation == 0 else "wrong selection"
    rows = "1 row" if choice.rows == 1 else f"{choice.rows} rows"
    return Reason(word, f"{rows} chose another set; {choice.example}")


def _not_finite(value: ir.Value, array: Array, floats: Mapping[str, Array], dtype: str) -> Reason:
    place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    what = "NaN" if np.isnan(array[place]) else "infinite"
    node = value.producer()
    assert node is not None
    sizes = [np.abs(floats[str(one.name)]).max() for one in node.inputs if one is not None and str(one.name) in floats]
    if dtype == "float16" and what == "infinite":
        size = f", whose inputs reach {max(map(float, sizes)):.3g}" if sizes else ""
        return Reason("fp16 overflow", f"{_node(value)}{size}: a value beyond {HALF_MAX:.0f} at {list(place)}")
    return Reason("NaN origin", f"{_node(value)} gives the first {what} number at {list(place)}, of finite inputs")


def _lost(value: ir.Value, array: Array, floats: Mapping[str, Array]) -> bool:
    """Whether a product became zero where no factor was: flushed, or too small for the dtype."""
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return False
    factors = [floats.get(str(one.name)) if one is not None else None for one in node.inputs]
    known = [factor for factor in factors if factor is not None]
    if not known:
        return False
    nonzero = np.ones(array.shape, bool)
    for factor in known:
        nonzero &= np.broadcast_to(factor != 0, array.shape)
    return bool(nonzero.any()) and float((array[nonzero] == 0).mean()) > 0.5


def _words(points: set[str]) -> str:
    return ", ".join("the layer's input" if point == "x" else point for point in sorted(points))


def _node(value: ir.Value) -> str:
    node = value.producer()
    return f"{node.op_type} {value.name!r}" if node is not None else repr(value.name)


def _pattern(own: Measure) -> str:
    found = own.difference
    return (
        f"max {found.max_abs:.3g} and rms {found.rms:.3g} of numbers up to {found.scale:.3g}, the worst at "
        f"{list(found.worst_index)}; weights and inputs are those of the stage"
    )
