"""Run cases on a bundle and on the reference, and judge every number.

For each case: the bundle; the bundle with its selections exposed (where anything is selected); the reference in the
bundle's dtype; the reference in the next wider dtype, whose difference to the former is the noise. Where that noise
does not explain what is found, and chance might, more of it is drawn (see `noise.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from doge_deploy.bundle.manifest import Manifest
from doge_deploy.bundle.opening import Bundle
from doge_deploy.bundle.signature import UNCACHED
from doge_deploy.runtime.base import BundleRunner, IntArray
from doge_deploy.targets.backend import Backend
from doge_deploy.verify.cases import Case, Limits, chunk, exact_cases, natural_case
from doge_deploy.verify.compare import Array, Difference, Top1, difference, kl_divergence, top1
from doge_deploy.verify.noise import DRAWS, MOST_BY_CHANCE, pool, rounded_once_more
from doge_deploy.verify.reference import Reference, Selections
from doge_deploy.verify.replay import CandidateTrace, Replay, ReplayTrace, greedy_calls
from doge_deploy.verify.tolerance import AllowedDifference, limit

GREEDY = "greedy"
NATURAL = "natural text"

PADDING = {"static": "right", "growing": "left", UNCACHED: "masked"}
"""Where a layout's calls have their padding, see `Replay`."""

OUTPUTS = {"causal-lm": "logits", "sequence-classification": "logits", "features": "last_hidden_state"}
"""What a task gives."""

SEEDS = (0, 100, 200, 300)
"""Tried in turn until an exactness case has wide margins in the reference."""


@dataclass(frozen=True)
class Quantity:
    """One compared tensor of a case: its difference and what was allowed."""

    name: str
    difference: Difference
    limit: AllowedDifference

    @property
    def passed(self) -> bool:
        return self.difference.within(self.limit)

    @property
    def load(self) -> float:
        """How much of the tolerance is used, 1 being all."""
        if self.difference.non_finite:
            return float("inf")
        pairs = ((self.difference.max_abs, self.limit.max_abs), (self.difference.rms, self.limit.rms))
        return max(found / allowed if allowed else (float("inf") if found else 0.0) for found, allowed in pairs)

    @property
    def may_be_chance(self) -> bool:
        """Whether the one draw of noise that the limit is made of may have been too small a draw for it."""
        return self.load <= MOST_BY_CHANCE


@dataclass
class CaseResult:
    """What became of a case."""

    case: str
    layout: str
    quantities: list[Quantity] = field(default_factory=list)
    kl: float = 0.0
    """Largest KL divergence of a position, nats."""
    top1: Top1 = field(default_factory=lambda: Top1(0, 0, None, None))
    selected: str = ""
    """How selections were judged: "exact", "certificate", or "" where nothing was selected."""
    tied_rows: int = 0
    """Rows in which the bundle chose another set than the reference, all of them covered by the certificate or
    failing.
    """
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def logits(self) -> Quantity:
        """What the task is about: logits, or last hidden states."""
        return self.quantities[0]

    @property
    def worst_cache(self) -> Quantity | None:
        """The present tensor that uses most of its tolerance."""
        return max(self.quantities[1:], key=lambda q: q.load, default=None)


def verify_layouts(
    bundle: Bundle,
    runners: Mapping[str, Runners],
    references: References,
    *,
    text_ids: IntArray,
    greedy_steps: int,
    started: Callable[[str], None],
    finished: Callable[[CaseResult], None],
    skipped: dict[str, str],
) -> list[CaseResult]:
    """Run every case, on each layout in turn (they share the reference's runs where the calls are the same).

    Args:
        bundle: what is verified.
        runners: per layout its graph, as it is and with its selections exposed.
        references: transformers in the bundle's dtype and in the next wider one.
        text_ids: natural text `[T]`, repeated as needed.
        greedy_steps: tokens of the greedy case.
        started: told each case before it is run.
        finished: told each result when it is there.
        skipped: takes the cases that a runner cannot run or show, with the reason.
    """
    facts = bundle.manifest.facts
    task = bundle.manifest.task
    limits = Limits.of(facts, bundle.manifest.max_length, task)
    judges = [Judge(bundle, layout, pair, references) for layout, pair in runners.items()]
    prompt = np.resize(text_ids, min(16, max(1, limits.max_length // 2)))
    steps = min(greedy_steps, limits.max_length - len(prompt))

    def make(judge: Judge, name: str) -> Case:
        if name == NATURAL:
            return natural_case(limits, text_ids)
        if name == GREEDY:
            shown = steps if not judge.runners.hides_selections else min(steps, limits.keep_window_size - len(prompt))
            calls = chunk([prompt], [[len(prompt)]])
            if judge.runners.obstacle(Case(name, calls, exact=False)) is None and shown > 0:
                calls = greedy_calls(judge.runners.plain, prompt, shown)
            return Case(name, calls, exact=False)
        return judge.widest(lambda seed: _case(limits, seed, name))

    results = []
    free = [NATURAL, GREEDY] if task == "causal-lm" else [NATURAL]
    for name in [*(case.name for case in exact_cases(limits, SEEDS[0])), *free]:
        started(name)
        references.forget()
        for judge in judges:
            case = make(judge, name)
            reason = judge.obstacle(case)
            if reason is not None:
                skipped[name] = reason
                continue
            results.append(judge.judge(case))
            finished(results[-1])
    return results


def _case(limits: Limits, seed: int, name: str) -> Case:
    return next(case for case in exact_cases(limits, seed) if case.name == name)


@dataclass(frozen=True)
class Runners:
    """The graph under test."""

    plain: BundleRunner
    exposed: BundleRunner | None
    """With its selections as further outputs, maybe the same; None where the graph selects nothing, or does not show
    what."""
    hides_selections: bool = False
    """Whatever it selects, nobody sees it: an engine has the outputs that it was built with."""
    backend: Backend[Any] | None = None
    """What opened them; None for a runner of no backend."""

    def obstacle(self, case: Case) -> str | None:
        """Why a case cannot be run; None: it can."""
        calls = [call.input_ids.shape for call in case.calls]
        refused = next(filter(None, (self.plain.refusal(*shape) for shape in calls)), None)
        return refused if refused or self.backend is None else self.backend.obstacle(self.plain, calls)


@dataclass(frozen=True)
class References:
    """The oracle and its more exact twin, with the runs of the current case."""

    same: Reference
    wider: Reference
    _runs: dict[tuple[object, ...], ReplayTrace] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop the runs of the last case."""
        self._runs.clear()

    def run(self, reference: Reference, replay: Replay, case: Case) -> ReplayTrace:
        """`case` on one of the two with its own selections; the same calls are run once."""
        padded = any(call.lengths.min() < call.input_ids.shape[1] for call in case.calls)
        calls = tuple((call.input_ids.tobytes(), call.lengths.tobytes()) for call in case.calls)
        key = (id(reference), replay.padding if padded else "", calls)
        if key not in self._runs:
            self._runs[key] = replay.run(reference, case)
        return self._runs[key]


def make_replay(manifest: Manifest, layout: str, *, last_logits: bool) -> Replay:
    """How the calls of a bundle's layout are made in the reference."""
    return Replay(
        padding=PADDING[layout],
        tokenwise=manifest.facts.is_moe and manifest.options.routing == "per-token",
        last_logits=last_logits,
        sliding_window=manifest.facts.sliding_window,
    )


class Judge:
    """Runs a case on both sides and compares."""

    def __init__(self, bundle: Bundle, layout: str, runners: Runners, references: References) -> None:
        self.manifest = bundle.manifest
        self.layout = layout
        self.runners = runners
        self.references = references
        self.replay = make_replay(self.manifest, layout, last_logits=runners.plain.last_logits)

    def selects(self, case: Case) -> bool:
        """Whether the bundle chooses keys or experts in this case."""
        facts = self.manifest.facts
        chooses = self.runners.exposed is not None or self.runners.hides_selections
        return chooses and (facts.is_moe or facts.keep_window(case.longest))

    def obstacle(self, case: Case) -> str | None:
        """Why the case cannot be run or judged here; None: it can."""
        reason = self.runners.obstacle(case)
        if reason is not None:
            return reason
        if not self.runners.hides_selections or not self.selects(case):
            return None
        if not case.exact:
            return f"selects among ties, and {self._title} does not show what it selects; another backend can be judged"
        same, wider = (
            self.references.run(one, self.replay, case) for one in (self.references.same, self.references.wider)
        )
        if same.gap <= max(self._selection_limits(same, wider).values(), default=0.0):
            return (
                f"the reference's own selections lie within its noise, and {self._title} does not show what it selects"
            )
        return None

    @property
    def _title(self) -> str:
        return "the backend" if self.runners.backend is None else self.runners.backend.title

    def widest(self, make: Callable[[int], Case]) -> Case:
        """The case of that seed on which the reference's choices are clearest."""
        first = make(SEEDS[0])
        if not self.selects(first):
            return first
        cases = [first, *(make(seed) for seed in SEEDS[1:])]
        return max(cases, key=lambda case: self.references.run(self.references.same, self.replay, case).gap)

    def judge(self, case: Case) -> CaseResult:
        """Compare one case."""
        candidate = self.replay.feed(self.runners.plain, case)
        given = None
        if self.runners.exposed is not None and self.selects(case):
            same_runner = self.runners.exposed is self.runners.plain
            shown = candidate if same_runner else self.replay.feed(self.runners.exposed, case)
            given = shown.selections
        same = self._reference(self.references.same, case, given, use_given=not case.exact)
        wider = self._reference(self.references.wider, case, given)
        result = CaseResult(case.name, self.layout)
        if given is not None:
            same = self._judge_selections(result, case, given, same, wider)
        self._compare(result, candidate, same, wider)
        if any(quantity.may_be_chance for quantity in result.quantities if not quantity.passed):
            more = [self._draw(case, given, seed) for seed in range(DRAWS)]
            self._compare(result, candidate, same, wider, more)
        result.failures += [_failure(quantity) for quantity in result.quantities if not quantity.passed]
        if OUTPUTS[self.manifest.task] == "logits":  # features are no distribution
            _compare_choices(result, candidate, same)
        return result

    def _draw(self, case: Case, given: Sequence[Selections] | None, seed: int) -> ReplayTrace:
        """The reference with other rounding errors, and the bundle's selections."""
        with rounded_once_more(self.references.same.model, seed):
            return self.replay.run(self.references.same, case, given)

    def _reference(
        self, reference: Reference, case: Case, given: Sequence[Selections] | None, *, use_given: bool = True
    ) -> ReplayTrace:
        if given is None:
            return self.references.run(reference, self.replay, case)
        return self.replay.run(reference, case, given, use_given=use_given)

    def _judge_selections(
        self, result: CaseResult, case: Case, given: Sequence[Selections], same: ReplayTrace, wider: ReplayTrace
    ) -> ReplayTrace:
        """Sets of keys and experts; returns the reference's run that the numbers are to be compared with."""
        epsilon = self._selection_limits(same, wider)
        result.tied_rows = same.differing
        clear = same.gap > max(epsilon.values(), default=0.0)
        if case.exact and clear:
            result.selected = "exact"
            if same.differing:
                result.failures.append(f"{same.differing} rows select other keys or experts than the reference")
            return same
        result.selected = "certificate"
        if case.exact:
            same = self.replay.run(self.references.same, case, given)
        for name, amount in same.violation.items():
            if amount > epsilon[name]:
                result.failures.append(
                    f"{name}: the selection is not a best one by {amount:.3g} (allowed {epsilon[name]:.3g})"
                )
        return same

    def _selection_limits(self, same: ReplayTrace, wider: ReplayTrace) -> dict[str, float]:
        """How far each layer's selection may be from a best one."""
        dtype, limits = self.manifest.dtype, {}
        for layer in range(self.manifest.facts.num_hidden_layers):
            noise = difference(same.present[f"present.{layer}.score"], wider.present[f"present.{layer}.score"])
            limits[f"kept.{layer}"] = limit(
                "kept", dtype, noise_max=noise.max_abs, noise_rms=noise.rms, scale=noise.scale
            ).max_abs
            if layer in same.router:
                noise = difference(same.router[layer], wider.router[layer])
                limits[f"experts.{layer}"] = limit(
                    "experts", dtype, noise_max=2 * noise.max_abs, noise_rms=0.0, scale=2 * noise.scale
                ).max_abs
        return limits

    def _compare(
        self,
        result: CaseResult,
        candidate: CandidateTrace,
        same: ReplayTrace,
        wider: ReplayTrace,
        more: Sequence[ReplayTrace] = (),
    ) -> None:
        """Every tensor against the reference, by its noise: that of this run, and of `more` where they are given."""
        output = OUTPUTS[self.manifest.task]

        def tensors(trace: ReplayTrace) -> dict[str, list[Array]]:
            held = {name: candidate.held(name, trace.present[name]) for name in candidate.present}
            return {output: trace.logits, **held}

        found = {output: candidate.logits, **candidate.present}
        expected, exact, draws = tensors(same), tensors(wider), [tensors(trace) for trace in more]
        result.quantities.clear()
        for name, rows in found.items():
            # A pair of class logits is too small a sample of noise: that of every token's is taken.
            if name == output and same.classes:
                noise = pool([difference(trace.classes, wider.classes) for trace in (same, *more)])
            else:
                noise = pool([difference(drawn[name], exact[name]) for drawn in (expected, *draws)])
            allowed = limit(
                name.rsplit(".", 1)[-1],
                self.manifest.dtype,
                noise_max=noise.max_abs,
                noise_rms=noise.rms,
                scale=noise.scale,
                count=noise.effective,
            )
            result.quantities.append(Quantity(name, difference(rows, expected[name]), allowed))


def _compare_choices(result: CaseResult, candidate: CandidateTrace, same: ReplayTrace) -> None:
    """Distributions of logits, and the likeliest tokens."""
    if result.logits.difference.non_finite:
        return
    # Of a greedy text only the tokens that it continues with are of interest, not those of the prompt.
    first = -1 if result.case == GREEDY else None
    a, b = (np.concatenate([rows[first:] for rows in side.logits]) for side in (candidate, same))
    result.kl = kl_divergence(a, b)
    result.top1 = top1(a, b)
    margin = result.top1.margin
    if margin is not None and margin > 2 * result.logits.limit.max_abs:
        result.failures.append(
            f"token {result.top1.first_divergence} differs with margin {margin:.3g} "
            f"(noise explains {2 * result.logits.limit.max_abs:.3g})"
        )


def _failure(quantity: Quantity) -> str:
    found, allowed = quantity.difference, quantity.limit
    if found.non_finite:
        return f"{quantity.name}: {found.non_finite} NaN or infinite numbers"
    return (
        f"{quantity.name}: max {found.max_abs:.3g} (allowed {allowed.max_abs:.3g}), rms {found.rms:.3g} "
        f"(allowed {allowed.rms:.3g}), worst at {list(found.worst_index)}"
    )
