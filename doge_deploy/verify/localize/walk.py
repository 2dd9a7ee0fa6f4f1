"""Through a case, layer by layer: the reference's stages, and every graph's beside them.

A layer is walked for all calls before the next one is: only the states between two layers are kept, and what a layer
holds; each graph is opened for one layer at a time. So memory does not grow with the number of layers.

Axes as in `oracle.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from doge_deploy.graph.stages import point_name, split_point
from doge_deploy.verify.cases import Call
from doge_deploy.verify.compare import Array, Difference, difference
from doge_deploy.verify.localize.calls import CallView
from doge_deploy.verify.localize.column import SETS, Column, Tapped
from doge_deploy.verify.localize.finding import Choice, Measure, Reading
from doge_deploy.verify.localize.oracle import Cache, Context, Stages, Values, best_experts, best_keys, to_array
from doge_deploy.verify.localize.shapes import fitted, of_last
from doge_deploy.verify.noise import DRAWS, MOST_BY_CHANCE, pool
from doge_deploy.verify.tolerance import ULP, AllowedDifference, limit

TAP_BYTES = 64 << 20
"""Layers are tapped together as long as what they show of a case stays below this."""

FOLLOWED_ULPS = 1024
"""How far from a best one a graph's selection may be, in units in the last place, for the reference to follow it: as
far as noise of the layers before can bring it. It is judged by itself in any case.
"""

OWN_FACTOR = 2.0
"""Times what the table of tolerances allows. A stage has the noise of few operators, so that what two libraries do
otherwise is not averaged out: PyTorch's single-row GEMV makes half the error of ONNX Runtime's (`tolerance.py`). And
thousands of stages are looked at where `verify` looks at few tensors.
"""

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Spot:
    """A call in a layer: what a cut graph needs to be run once more."""

    view: CallView
    caches: Arrays
    values: Arrays
    """By point, with as many tokens as the column has there."""


class Walk:
    """A case on the reference and on every column.

    Args:
        same, wide: the reference's stages in the bundle's dtype and in the next wider one.
        columns: graphs under test; selections of the reference follow the first, as far as they are among the best.
        views: the calls as the layout sees them.
        calls: the same calls as a runner takes them.
        dtype: the bundle's.
        window: keep_window_size where the layout drops keys, else 0.
        static: the layout is static.
    """

    def __init__(
        self,
        same: Stages,
        wide: Stages,
        columns: Sequence[Column],
        views: Sequence[CallView],
        calls: Sequence[Call],
        *,
        dtype: str,
        window: int,
        static: bool,
    ) -> None:
        self.same, self.wide, self.columns = same, wide, columns
        self.views, self.calls = views, calls
        self.dtype, self.window, self.static = dtype, window, static
        self.readings: list[Reading] = []
        self.logits: dict[str, list[Array]] = {}
        """By column: what its tapped run gave in the end."""
        self.first: tuple[Reading, Spot] | None = None
        """The first stage that errs, and its input."""
        self.head: list[Array] = []
        """Per call the reference's logits (or features) of every token."""

    def run(self, started: Callable[[str], None] = lambda what: None) -> None:
        """Walk all layers; fills `readings`."""
        rotations = (self.same.rotations(self.views), self.wide.rotations(self.views))
        outside = {column.name: column.tapped([None], self.calls) for column in self.columns}
        self.logits = {name: tapped.logits for name, tapped in outside.items()}
        states = [self.same.embedding(view) for view in self.views]
        wides = [self.wide.embedding(view) for view in self.views]
        self._outside("embedding", states, wides, [{} for _ in self.views], outside, {})
        carried: list[Arrays] = [{"embedding": to_array(x)} for x in states]
        count = self.same.facts.num_hidden_layers
        group = self._group()
        tapped: dict[str, Tapped] = {}
        for layer in range(count):
            started(f"layer {layer + 1} of {count}")
            if layer % group == 0:
                tapped.clear()
                wanted = range(layer, min(layer + group, count))
                tapped = {column.name: column.tapped(wanted, self.calls) for column in self.columns}
            states, wides, carried = self._layer(layer, states, wides, carried, rotations, tapped)
        normed, wide_normed = [self.same.norm(x) for x in states], [self.wide.norm(x) for x in wides]
        self._outside("norm", normed, wide_normed, carried, outside, tapped)
        self.head = [to_array(x) for x in normed]
        if self.same.reference.task == "features":
            return
        carried = [{"norm": to_array(x)} for x in normed]
        ends, wide_ends = [self.same.head(x) for x in normed], [self.wide.head(x) for x in wide_normed]
        self._outside("head", ends, wide_ends, carried, outside, {})
        self.head = [to_array(x) for x in ends]

    def _group(self) -> int:
        """Layers that are tapped together."""
        facts = self.same.facts
        tokens = sum(view.ids.size for view in self.views)
        heads = facts.num_attention_heads + facts.num_key_value_heads
        width = 8 * facts.hidden_size + 3 * facts.intermediate_size + 4 * heads * facts.head_dim
        return int(max(1, TAP_BYTES // (4 * tokens * width)))

    def _columns_of_case(self) -> int:
        """Columns of a static cache that the case needs."""
        return max(view.columns for view in self.views)

    def _layer(
        self,
        layer: int,
        states: list[torch.Tensor],
        wides: list[torch.Tensor],
        carried: list[Arrays],
        rotations: tuple[list[tuple[torch.Tensor, torch.Tensor]], ...],
        tapped: dict[str, Tapped],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Arrays]]:
        names = self.same.points(layer)
        wanted = {point_name(layer, name) for name in names}
        sessions = {column.name: column.open_cut(wanted) for column in self.columns}
        batch = len(self.views[0].ids)
        columns = self._columns_of_case() if self.static else 0
        cache, wide_cache = self.same.empty_cache(batch, columns), self.wide.empty_cache(batch, columns)
        next_states, next_wides, next_carried = [], [], []
        for index, view in enumerate(self.views):
            first = tapped[self.columns[0].name].values[index]
            context = Context(view, rotations[0][index], cache, self.static, self.window)
            values, context = self._followed(layer, states[index], context, first)
            sets = {name: values[name] for name in SETS if name in values}
            wide_context = Context(view, rotations[1][index], wide_cache, self.static, self.window, sets)
            wide_values = self.wide.layer(layer, wides[index], wide_context)
            arrays = {point_name(layer, name): to_array(values[name]) for name in names if name not in SETS}
            caches = _arrays(cache)
            for column in self.columns:
                shown = tapped[column.name].values[index]
                spot = Spot(view, caches, fitted({**carried[index], **arrays}, shown, view))
                own = sessions[column.name].run(view, caches, spot.values)
                start = len(self.readings)
                self._read(layer, index, column.name, values, wide_values, context, own, shown, rotations[1][index])
                self._remember(self.readings[start:], spot)
            cache, wide_cache = (
                context.advanced(values, self.same.facts),
                wide_context.advanced(wide_values, self.same.facts),
            )
            next_states.append(values["mlp_residual"])
            next_wides.append(wide_values["mlp_residual"])
            next_carried.append(_carried(layer, arrays))
        return next_states, next_wides, next_carried

    def _followed(self, layer: int, x: torch.Tensor, context: Context, shown: Arrays) -> tuple[Values, Context]:
        """The reference's stages, with the selections that a graph showed wherever they are among the best."""
        values = self.same.layer(layer, x, context)
        given: dict[str, torch.Tensor] = {}
        for name in SETS:
            point = point_name(layer, name)
            if name in values and point in shown:
                theirs = as_set(name, shown[point], context.view, static=self.static)
                choice = self._choice(name, theirs, values, context)
                near = self._slack(name, values, context, FOLLOWED_ULPS)
                if choice.rows and choice.violation <= near:
                    given[name] = theirs
        if not given:
            return values, context
        context = replace(context, given=given)
        return self.same.layer(layer, x, context), context

    def _slack(self, name: str, values: Values, context: Context, ulps: float) -> float:
        """Some units in the last place of what is ranked."""
        ranked = self.same.scores(values, context) if name == "selection" else self.same.sums(values["router"])
        return ulps * ULP[self.dtype] * float(ranked.abs().amax())

    def _choice(self, name: str, theirs: torch.Tensor, values: Values, context: Context) -> Choice:
        """A set against the best one by the reference's own numbers; of equals the first are best, as the operators
        promise.
        """
        view = context.view
        if name == "selection":
            scores = self.same.scores(values, context)
            visible = torch.from_numpy(view.visible)[:, None]
            best = best_keys(scores, visible, self.window) if self.window else visible.expand(theirs.shape)
            ranked = scores[:, :, None].float().expand(theirs.shape)
            legal = (theirs & ~visible).sum(-1) == 0
            rows = torch.from_numpy(np.ascontiguousarray(view.real))[:, None].expand(theirs.shape[:3])
        else:
            first, second = self.same.halves(values["router"])
            ranked = self.same.sums(values["router"])
            count = theirs.shape[1]
            best = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, best_experts(first, second, count), True)
            theirs = torch.zeros_like(best).scatter(1, theirs, True)
            legal = torch.ones(len(best), dtype=torch.bool)
            rows = torch.from_numpy(np.ascontiguousarray(view.real)).reshape(-1)
        differs = (theirs != best).any(-1) & rows
        if not bool(differs.any()):
            return Choice(0, 0.0, "")
        missing = torch.where(best & ~theirs, ranked.double(), -torch.inf).amax(-1)
        taken = torch.where(theirs & ~best, ranked.double(), torch.inf).amin(-1)
        size = (theirs.sum(-1) == best.sum(-1)) & legal
        amount = torch.where(size, (missing - taken).clamp_min(0), torch.inf)
        amount = torch.where(differs, amount, -torch.inf)
        worst = float(amount.max())
        place = np.unravel_index(int(amount.argmax()), amount.shape)
        row = tuple(int(i) for i in place)
        kept, wanted = (torch.nonzero(one[row])[:, 0].tolist() for one in (theirs & ~best, best & ~theirs))
        what = "key" if name == "selection" else "expert"
        example = f"row {list(row)} takes {what} {_some(kept)} where {_some(wanted)} {_rank(worst)}"
        return Choice(int(differs.sum()), max(worst, 0.0), example)

    def _remember(self, readings: Sequence[Reading], spot: Spot) -> None:
        """Keep the first that errs."""
        for reading in readings:
            if reading.errs and (self.first is None or reading.order < self.first[0].order):
                self.first = reading, spot

    def _read(
        self,
        layer: int,
        call: int,
        column: str,
        values: Values,
        wide_values: Values,
        context: Context,
        own: Arrays,
        shown: Arrays,
        wide_rotation: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Note every point of a layer."""
        view = context.view
        own_sets = {
            name: as_set(name, own[point_name(layer, name)], view, static=self.static)
            for name in SETS
            if point_name(layer, name) in own
        }
        expected = {**values, **own_sets}
        upcast = {
            name: value.to(self.wide.dtype) if value.is_floating_point() else value for name, value in expected.items()
        }
        wide_context = replace(context, cache=context.cache.to(self.wide.dtype), rotation=wide_rotation)
        for name in self.same.points(layer):
            point = point_name(layer, name)
            if name in SETS:
                if name in own_sets:
                    choice = self._choice(name, own_sets[name], values, context)
                    loose = name == "expert_selection" and self.dtype != "float32"
                    if loose and choice.violation <= self._slack(name, values, context, 2):
                        choice = Choice(0, 0.0, "")  # sums of half numbers may be kept in float32
                    self.readings.append(Reading(call, point, column, choice, None))
                continue
            same = self.same.stage(layer, name, expected, context) if own_sets else values[name]
            exact = self.wide.stage(layer, name, upcast, wide_context)

            def again(seed: int, name: str = name) -> torch.Tensor:
                """The stage with its input rounded once more, which draws all of its roundings anew."""
                drawn, cache = rounded(expected, context.cache, seed)
                return self.same.stage(layer, name, drawn, replace(context, cache=cache))

            self.readings.append(
                Reading(
                    call,
                    point,
                    column,
                    self._own(point, own.get(point), same, exact, view, again),
                    self._inherited(point, shown.get(point), values[name], wide_values[name], view),
                )
            )

    def _inherited(
        self, point: str, array: Array | None, same: torch.Tensor, wide: torch.Tensor, view: CallView
    ) -> Measure | None:
        """A run as a whole: a graph's numbers against the reference's, by the noise of all stages so far."""
        if array is None:
            return None
        found = _rows(array, array.shape[1], view)
        expected, exact = (_rows(to_array(x), array.shape[1], view) for x in (same, wide))
        return Measure(difference(found, expected), self._allowed(point, [difference(expected, exact)]))

    def _own(
        self,
        point: str,
        array: Array | None,
        same: torch.Tensor,
        wide: torch.Tensor,
        view: CallView,
        again: Callable[[int], torch.Tensor],
    ) -> Measure | None:
        """A stage alone: a graph's numbers against the exact ones, by the noise of the reference's stage.

        Where one draw of noise does not explain what is found, and chance might, `again` draws more.
        """
        if array is None:
            return None
        found = _rows(array, array.shape[1], view)
        expected, exact = (_rows(to_array(x), array.shape[1], view) for x in (same, wide))
        draws = [difference(expected, exact)]
        measure = Measure(difference(found, exact), self._allowed(point, draws, OWN_FACTOR))
        if not measure.passed and measure.load <= MOST_BY_CHANCE:
            draws += [difference(_rows(to_array(again(seed)), array.shape[1], view), exact) for seed in range(DRAWS)]
            measure = Measure(measure.difference, self._allowed(point, draws, OWN_FACTOR))
        return measure

    def _allowed(self, point: str, draws: list[Difference], factor: float = 1.0) -> AllowedDifference:
        noise = pool(draws)
        allowed = limit(
            quantity(point),
            self.dtype,
            noise_max=noise.max_abs,
            noise_rms=noise.rms,
            scale=noise.scale,
            count=noise.effective,
        )
        return AllowedDifference(factor * allowed.max_abs, factor * allowed.rms)

    def _outside(
        self,
        point: str,
        states: list[torch.Tensor],
        wides: list[torch.Tensor],
        carried: list[Arrays],
        tapped: dict[str, Tapped],
        ends: dict[str, Tapped],
    ) -> None:
        """Note a point outside the layers; `ends` show the layers next to it."""
        empty = _arrays(self.same.empty_cache(len(self.views[0].ids), self._columns_of_case() if self.static else 0))
        last = self.same.facts.num_hidden_layers - 1
        for column in self.columns:
            session = column.open_cut({point})
            if not session.part.outputs:
                continue
            offset = 0
            for index, view in enumerate(self.views):
                shown = dict(tapped[column.name].values[index])
                rows = tapped[column.name].logits[offset : offset + len(view.ids)]
                offset += len(view.ids)
                near = ends[column.name].values[index] if ends else {}
                spot = Spot(view, empty, fitted(carried[index], {**near, **shown}, view))
                own = session.run(view, empty, spot.values).get(point)
                inherited = _padded(rows, view) if point == "head" else shown.get(point)
                exact = self._exact(point, carried[index], view, last)

                def again(seed: int, index: int = index) -> torch.Tensor:
                    drawn = {name: torch.from_numpy(array) for name, array in carried[index].items()}
                    return self._outside_once_more(point, drawn, seed, states[index], last)

                reading = Reading(
                    index,
                    point,
                    column.name,
                    self._own(point, own, states[index], exact, view, again),
                    self._inherited(point, inherited, states[index], wides[index], view),
                )
                self.readings.append(reading)
                self._remember([reading], spot)

    def _outside_once_more(self, point: str, values: Values, seed: int, same: torch.Tensor, last: int) -> torch.Tensor:
        """A point outside the layers with its input rounded once more."""
        if point == "embedding":
            return same
        values, _ = rounded(values, self.same.empty_cache(1, 0), seed)
        values = {name: value.to(self.same.dtype) for name, value in values.items()}
        return (
            self.same.head(values["norm"])
            if point == "head"
            else self.same.norm(values[point_name(last, "mlp_residual")])
        )

    def _exact(self, point: str, carried: Arrays, view: CallView, last: int) -> torch.Tensor:
        """A point outside the layers in the wider dtype, on the numbers of the narrower one."""
        if point == "embedding":
            return self.wide.embedding(view)
        if point == "head":
            return self.wide.head(torch.from_numpy(carried["norm"]).to(self.wide.dtype))
        return self.wide.norm(torch.from_numpy(carried[point_name(last, "mlp_residual")]).to(self.wide.dtype))


def quantity(point: str) -> str:
    """The row of the table of tolerances."""
    name = split_point(point)[1]
    return {"score": "score", "rope_k": "key", "v": "value"}.get(name, "logits")


def _rows(array: Array, count: int, view: CallView) -> list[Array]:
    """Per row the real tokens (or keys) of a state, of which the graph has `count`."""
    if count == 1 and array.shape[1] != 1:
        return list(of_last(array, view))
    keys = array.shape[1] == view.columns and array.shape[1] != view.ids.shape[1]
    mask = view.held if keys or count > view.ids.shape[1] else view.real
    if count < array.shape[1]:  # a sliding cache has lost the first keys
        array = array[:, -count:]
    mask = mask[:, -count:]
    if count == 1:
        mask = np.ones_like(mask)
    return [x[real] for x, real in zip(array, mask, strict=True)]


def rounded(values: Values, cache: Cache, seed: int) -> tuple[Values, Cache]:
    """States that are off by a unit in the last place, one number in twelve: the variance of one more rounding.

    See `doge_deploy.verify.rounding`, which does the same to a whole model.
    """
    generator = torch.Generator().manual_seed(seed)

    def off(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return x
        drawn = torch.rand(x.shape, generator=generator)
        sign = (drawn < 1 / 24).to(x.dtype) - (drawn > 23 / 24).to(x.dtype)
        return x * (1 + torch.finfo(x.dtype).eps * sign)

    return {name: off(x) for name, x in values.items()}, Cache(off(cache.key), off(cache.value), off(cache.score))


def as_set(name: str, array: Array, view: CallView, *, static: bool) -> torch.Tensor:
    """A set as a graph shows it, in the columns of the call."""
    if name == "expert_selection":
        return torch.from_numpy(np.ascontiguousarray(array))
    columns, have = view.columns, array.shape[-1]
    kept = np.zeros((*array.shape[:3], columns), bool)
    if static:  # all slots, or those in use
        kept[..., : min(have, columns)] = array[..., :columns]
    else:  # a sliding cache has lost the first columns
        kept[..., columns - have :] = array
    return torch.from_numpy(kept)


def _padded(rows: Sequence[Array], view: CallView) -> Array:
    """Logits of the real tokens, in the place of their tokens."""
    width = view.ids.shape[1]
    if all(len(row) == 1 for row in rows):
        return np.stack(rows)
    result = np.zeros((len(rows), width, rows[0].shape[-1]), rows[0].dtype)
    for b, row in enumerate(rows):
        result[b][view.real[b]] = row
    return result


def _arrays(cache: Cache) -> Arrays:
    return {
        "key": to_array(cache.key),
        "value": to_array(cache.value),
        "score": to_array(cache.score.unsqueeze(-1)),
    }


def _carried(layer: int, arrays: Arrays) -> Arrays:
    """What the next layer's graph may read of this one: fused nodes reach over the border."""
    points = [point_name(layer, name) for name in ("residual", "down", "experts", "mlp_residual")]
    return {point: arrays[point] for point in points if point in arrays}


def _some(items: list[int]) -> str:
    return ", ".join(map(str, items[:3])) + ("..." if len(items) > 3 else "") if items else "none"


def _rank(amount: float) -> str:
    if amount == 0:
        return "scores the same and comes first"
    return "is due" if amount == float("inf") else f"scores {amount:.2g} more"
