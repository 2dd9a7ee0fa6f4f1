"""From a bundle to the stage that is at fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.bundle.signature import UNCACHED
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.diagnostics import suggest
from doge_deploy.errors import UsageError
from doge_deploy.graph.stages import MADE_BY, point_name, split_point, stage_of
from doge_deploy.graph.weight_formats import format_of
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.targets.backend import SessionOptions, find
from doge_deploy.verify.cases import Case
from doge_deploy.verify.compare import Array
from doge_deploy.verify.live import LiveOracle
from doge_deploy.verify.localize.calls import view_calls
from doge_deploy.verify.localize.column import Column
from doge_deploy.verify.localize.finding import (
    NOISE,
    VANISHED,
    Choice,
    Finding,
    Localization,
    Measure,
    Reading,
)
from doge_deploy.verify.localize.graphs import cut, load
from doge_deploy.verify.localize.oracle import Stages
from doge_deploy.verify.localize.reasons import Examiner
from doge_deploy.verify.localize.walk import Spot, Walk
from doge_deploy.verify.parity import Judge
from doge_deploy.verify.report import Report
from doge_deploy.verify.runners import holds_window, open_runners
from doge_deploy.verify.source import open_reference

STANDARD, LOWERED = "standard", "lowered"


def localize(
    path: str | Path,
    case: str | None = None,
    *,
    report: Report | None = None,
    reference: str | None = None,
    adapter: str | None = None,
    portable: bool = False,
    lowering: bool = False,
    greedy_steps: int = 128,
    started: Callable[[str], None] = lambda what: None,
) -> Localization:
    """Name the call, the layer and the stage of a bundle that makes an error, and the reason.

    Args:
        path: the bundle.
        case: `<layout>/<case>` or a case's name (of the bundle's first layout); where None, the first that failed in
            `report`.
        report: what `verify` found.
        reference, adapter, portable, lowering: as in `verify`.
        greedy_steps: tokens of the greedy case.
        started: told what is about to be done.

    Raises:
        UsageError: there is no such case, or neither a case nor a report was given.
        BrokenBundleError, UnsupportedModelError, MissingDependencyError: as in `verify`; also where the bundle's graphs
            were written by a version that marked no stages.
    """
    if case is None and report is None:
        raise UsageError("localize: name a case, or give a report of verify")
    bundle = open_bundle(path)
    if lowering:
        check_lowering(bundle)
    checkpoint = open_reference(bundle, reference, adapter)
    if case is None:
        assert report is not None
        case = next((f"{one.layout}/{one.case}" for one in report.results if not one.passed), None)
        if case is None:
            return _of_weights(report.weights.failures)
    layout, name = _split(bundle, case)
    with LiveOracle(bundle, checkpoint, greedy_steps=greedy_steps, started=started) as oracle:
        weights = (report.weights if report is not None else oracle.weights(bundle)).failures
        found = _Search(bundle, oracle, layout, weights, portable=portable, lowering=lowering).search(name, started)
    found.notes += _changed_facts(bundle, checkpoint)
    return found


def _changed_facts(bundle: Bundle, checkpoint: Checkpoint) -> list[str]:
    """What the checkpoint's config.json says now and did not say when the bundle was exported."""
    then, now = bundle.manifest.facts, checkpoint.facts
    changed = [
        f"{one.name} is {getattr(now, one.name)}, in the bundle {getattr(then, one.name)}"
        for one in fields(then)
        if getattr(then, one.name) != getattr(now, one.name)
    ]
    return [f"config.json of the checkpoint has changed since the export: {'; '.join(changed)}"] if changed else []


def check_lowering(bundle: Bundle) -> None:
    """Raises UsageError where the lowering for TensorRT is two graphs of their own: their cache holds the window, in a
    form that no stage of the reference has. All of them except attention is as in other lowered graphs.
    """
    if holds_window(bundle):
        window = bundle.manifest.facts.keep_window_size
        raise UsageError(
            f"{bundle.path}: --localize does not look into the two graphs of a cache that holds the window, which "
            "--lowering judges here; leave out --lowering for the graphs of the CPU, or export with --max-length "
            f"{window}, whose lowering differs in attention alone and is looked into"
        )


def _split(bundle: Bundle, case: str) -> tuple[str, str]:
    """Layout and name of a case."""
    layouts = list(bundle.manifest.layouts)
    layout, slash, name = case.partition("/")
    if slash and layout not in layouts:
        raise UsageError(f"--case {case}: the bundle has no layout {layout!r}; it has {', '.join(layouts)}")
    return (layout, name) if slash else (layouts[0], case)


def _of_weights(failures: Sequence[str]) -> Localization:
    """Where all cases passed: a weight that differs and that no case shows."""
    if not failures:
        return Localization("")
    tensor = failures[0].split(":")[0].split(" ")[0]
    layer = int(tensor.split(".")[2]) if tensor.startswith("model.layers.") else None
    return Localization(
        "weights",
        failures=tuple(failures),
        finding=Finding(
            "weights", 0, layer, tensor, (), 0.0, 0.0, NOISE, f"no case shows it, but {failures[0]}", "the weight file"
        ),
    )


class _Search:
    def __init__(
        self,
        bundle: Bundle,
        oracle: LiveOracle,
        layout: str,
        weights: Sequence[str],
        *,
        portable: bool,
        lowering: bool,
    ) -> None:
        self.bundle, self.oracle, self.layout = bundle, oracle, layout
        self.manifest = bundle.manifest
        self.weights = weights
        self.lowering = lowering
        self.backend = find(DEFAULT_BACKEND)
        weight_format = format_of(self.manifest.options)
        self.rounds = weight_format is not None and weight_format.rounds_activations
        self.options = SessionOptions(portable=portable or self.rounds, spin=False)
        self.runners = open_runners(bundle, layout, self.backend, self.options, lowering=lowering)
        self.judge = Judge(bundle, layout, self.runners, oracle)
        self.columns = self._open_columns(portable=portable)

    def _open_columns(self, *, portable: bool) -> list[Column]:
        """The graph that was judged first."""
        layout = self.bundle.layout(self.layout)

        def column(name: str, file: str, exact: object = None, lower: object = None) -> Column:
            options = replace(self.options, portable=name == STANDARD)
            return Column(
                name,
                self.bundle.path / file,
                self.bundle,
                layout,
                self.backend,
                options,
                exact or _as_it_is,  # type: ignore[arg-type]
                lower or _as_it_is,  # type: ignore[arg-type]
            )

        standard = column(STANDARD, layout.file)
        served = self.backend.runs(layout, SessionOptions())
        if self.lowering:
            from doge_deploy.targets.trt.lowering import lower

            lowered = column("TensorRT-lowered", layout.file, lower=partial(lower, round_inputs=False))
        elif served != layout.file:
            lowered = column(LOWERED, served, exact=_without_rounding if self.rounds else None)
        else:
            return [standard]
        return [standard, lowered] if portable or self.rounds else [lowered, standard]

    def search(self, name: str, started: Callable[[str], None]) -> Localization:
        legal = self.oracle.case_names()
        if name not in legal:
            raise UsageError(f"--case {name}: unknown case{suggest(name, legal)}; known: {', '.join(legal)}")
        case = self.oracle.case(name, self.judge)
        reason = case if isinstance(case, str) else self.judge.obstacle(case)
        if reason is not None:
            raise UsageError(f"--case {name}: {reason}")
        assert isinstance(case, Case)
        started(f"judge {self.layout}/{name}")
        plain = self.judge.judge(case)
        logits = self.judge.replay.feed(self.runners.plain, case).logits
        self.oracle.forget()
        walk = self._walk(case)
        walk.run(started)
        found = Localization(
            f"{self.layout}/{name}",
            tuple(column.name for column in self.columns),
            tuple(plain.failures),
            readings=walk.readings,
        )
        self._conclude(found, walk, [np.asarray(row) for row in logits])
        return found

    def _walk(self, case: Case) -> Walk:
        facts = self.manifest.facts
        routing = self.manifest.options.routing
        chosen = self.bundle.layout(self.layout)
        return Walk(
            Stages(self.oracle.references.same, routing),
            Stages(self.oracle.references.wider, routing),
            self.columns,
            view_calls(case.calls, self.layout, facts),
            case.calls,
            dtype=self.manifest.dtype,
            window=facts.keep_window_size if chosen.keep_window else 0,
            static=self.layout not in ("growing", UNCACHED),
        )

    def _conclude(self, found: Localization, walk: Walk, plain: list[Array]) -> None:
        """The finding, and whether watching changed anything."""
        first = self.columns[0].name
        watched = _apart(walk.logits[first], plain)
        ends = [reading for reading in found.readings if reading.point in ("head", "norm") and reading.column == first]
        still = any(reading.inherited is not None and not reading.inherited.passed for reading in found.readings)
        errs = found.errs()
        allowed = max((end.inherited.allowed.max_abs for end in ends if end.inherited is not None), default=0.0)
        if errs and walk.first is not None:
            found.finding = self._finding(found, errs, *walk.first)
        elif found.failures:
            found.finding = self._without_a_stage(found, still, changed=watched > allowed)
        if found.failures and watched > allowed and (errs or still):
            found.notes.append(
                f"watched, the {first} graph gives other logits (by {watched:.1e}): what it computes depends "
                "on which of its values are shown"
            )

    def _finding(self, found: Localization, errs: list[Reading], first: Reading, spot: Spot) -> Finding:
        both = _points_of_one_stage(first.point)
        same_place = [one for one in errs if one.call == first.call and one.point in both]
        names = [column.name for column in self.columns]
        same_place.sort(key=lambda one: names.index(one.column))
        column = next(one for one in self.columns if one.name == first.column)
        reason = Examiner(self.bundle, self.weights).reason(first, column, spot.view, spot.caches, spot.values)
        layer, _ = split_point(first.point)
        own = first.own
        error, noise = (own.violation, 0.0) if isinstance(own, Choice) else (0.0, 0.0)
        if isinstance(own, Measure):
            error, noise = own.error, own.allowed.max_abs
            if own.error <= noise:  # the largest is within its limit, the root mean square is not
                error, noise = own.difference.rms, own.allowed.rms
        others = {one.point for one in errs} - set(both)
        if others:
            shown = ", ".join(sorted(others)[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
            found.notes.append(f"further stages err by themselves: {shown}")
        columns = tuple(dict.fromkeys(one.column for one in same_place))
        return Finding(
            found.case,
            first.call,
            layer,
            stage_of(first.point),
            columns,
            error,
            noise,
            reason.word,
            reason.detail,
            self._fault_of(reason.word, columns, first, column),
        )

    def _fault_of(self, reason: str, columns: Sequence[str], first: Reading, column: Column) -> str:
        if reason == "wrong weight" and self.weights:
            return "the weight file"
        if STANDARD in columns or column.name == STANDARD:
            return f"the standard graph, {column.file.name}"
        model = load(column.file)
        makers = cut(model, {first.point}).makers()
        if self.lowering:
            return "the lowering for TensorRT"
        made = {node.metadata_props.get(MADE_BY) for node in load(column.file).graph}
        return f"{', '.join(makers) or 'the lowering'} ({column.file.name})" if made else column.file.name

    def _without_a_stage(self, found: Localization, still: bool, *, changed: bool) -> Finding:
        """A case that fails though no stage errs; `changed`: with its stages shown it gives other numbers."""
        first = self.columns[0].name
        if not still and not changed:
            words = (
                "no stage errs by itself, and the run as a whole stays within the noise of all stages: errors within "
                f"noise add up to what was found ({found.failures[0]})"
            )
            return Finding(found.case, 0, None, "", (first,), 0.0, 0.0, NOISE, words, "noise")
        if not still:
            words = (
                "it fails, and with its stages shown it does not: the fault vanishes when it is watched, so it lies in "
                "what the runtime makes of the whole graph, or in the runner's caches"
            )
            return Finding(found.case, 0, None, "", (first,), 0.0, 0.0, VANISHED, words, "the runtime")
        parted = [one for one in found.readings if one.column == first and one.inherited and not one.inherited.passed]
        reading = min(parted, key=lambda one: one.order, default=None)
        assert reading is not None and reading.inherited is not None
        layer, _ = split_point(reading.point)
        where = f"call {reading.call}" + ("" if layer is None else f", layer {layer}")
        words = (
            f"no stage errs by itself; errors within noise add up and pass what noise explains first at {where}, stage "
            f"`{stage_of(reading.point)}` ({reading.inherited.error:.1e}, noise explains "
            f"{reading.inherited.allowed.max_abs:.1e})"
        )
        return Finding(found.case, reading.call, layer, "", (first,), 0.0, 0.0, NOISE, words, "noise, or the caches")


def _points_of_one_stage(point: str) -> tuple[str, ...]:
    """Queries and keys are rotated by one stage, and a fused node shows the keys alone."""
    layer, name = split_point(point)
    return tuple(point_name(layer, one) for one in ("rope_q", "rope_k")) if name.startswith("rope") else (point,)


def _apart(one: Sequence[Array], two: Sequence[Array]) -> float:
    """Largest difference of two runs of one graph; infinite where one gives a number and the other does not."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        known = np.isfinite(a)
        if not np.array_equal(known, np.isfinite(b)):
            return float("inf")
        worst = max(worst, float(np.abs(a[known].astype(np.float64) - b[known]).max(initial=0.0)))
    return worst


def _as_it_is(model: ir.Model) -> ir.Model:
    return model


def _without_rounding(model: ir.Model) -> ir.Model:
    """Products of quantized weights in float32, where the graph rounds the state to 8 bits."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return model
