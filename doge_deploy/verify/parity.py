"""Run cases on a bundle, ask an oracle what the reference makes of them, and judge every number.

For each case: the bundle; the bundle with its selections exposed (where anything is selected); the reference in the
bundle's dtype, and its noise. Where that noise does not explain what is found, and chance might, more of it is asked
for (see `noise.py`). Where the reference comes from does not matter here: see `oracle.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from doge_deploy.bundle.manifest import Manifest
from doge_deploy.bundle.opening import Bundle
from doge_deploy.bundle.signature import UNCACHED
from doge_deploy.verify.cases import GREEDY, Case
from doge_deploy.verify.compare import Difference, Top1, kl_divergence, top1
from doge_deploy.verify.noise import MOST_BY_CHANCE
from doge_deploy.verify.oracle import Expected, Oracle
from doge_deploy.verify.positions import Positions, Sample, locate
from doge_deploy.verify.replay import CandidateTrace, Replay, Selections
from doge_deploy.verify.runners import Runners
from doge_deploy.verify.tolerance import AllowedDifference, limit

PADDING = {"static": "right", "growing": "left", UNCACHED: "masked"}
"""Where a layout's calls have their padding, see `Replay`."""

OUTPUTS = {"causal-lm": "logits", "sequence-classification": "logits", "features": "last_hidden_state"}
"""What a task gives."""


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
    positions: Positions | None = None
    """Where the logits differ; None where the task has none."""
    sample: Sample | None = None

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def logits(self) -> Quantity:
        """What the task is about: logits, or last hidden states."""
        return self.quantities[0]

    @property
    def worst(self) -> Quantity:
        """The tensor that uses most of its tolerance."""
        return max(self.quantities, key=lambda quantity: quantity.load)

    @property
    def load(self) -> float:
        """How much of its tolerance the case uses: that of its worst tensor."""
        return self.worst.load

    @property
    def worst_cache(self) -> Quantity | None:
        """The present tensor that uses most of its tolerance."""
        return max(self.quantities[1:], key=lambda q: q.load, default=None)


def verify_layouts(
    judges: Sequence[Judge],
    oracle: Oracle,
    *,
    started: Callable[[str], None],
    finished: Callable[[CaseResult], None],
    skipped: dict[str, str],
) -> list[CaseResult]:
    """Run every case, on each layout in turn.

    Args:
        judges: of each layout.
        oracle: the reference, entered, that all of them ask.
        started: told each case before it is run.
        finished: told each result when it is there.
        skipped: takes the cases that a runner cannot run or show, with the reason.
    """
    results = []
    for name in oracle.case_names():
        started(name)
        oracle.forget()
        for judge in judges:
            case = oracle.case(name, judge)
            reason = case if isinstance(case, str) else judge.obstacle(case)
            if reason is not None:
                skipped[name] = reason
                continue
            assert isinstance(case, Case)
            results.append(judge.judge(case))
            finished(results[-1])
    return results


def make_replay(manifest: Manifest, layout: str, *, last_logits: bool) -> Replay:
    """How the calls of a bundle's layout are made in the reference."""
    return Replay(
        padding=PADDING[layout],
        tokenwise=manifest.facts.is_moe and manifest.options.routing == "per-token",
        last_logits=last_logits,
        sliding_window=manifest.facts.sliding_window,
    )


class Judge:
    """Runs a case in a bundle and compares it with what an oracle says."""

    def __init__(self, bundle: Bundle, layout: str, runners: Runners, oracle: Oracle) -> None:
        self.manifest = bundle.manifest
        self.layout = layout
        self.runners = runners
        self.oracle = oracle
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
        if not _clear(self._expected(case, None)):
            return (
                f"the reference's own selections lie within its noise, and {self._title} does not show what it selects"
            )
        return None

    @property
    def _title(self) -> str:
        return "the backend" if self.runners.backend is None else self.runners.backend.title

    def judge(self, case: Case) -> CaseResult:
        """Compare one case."""
        candidate = self.replay.feed(self.runners.plain, case)
        given = None
        if self.runners.exposed is not None and self.selects(case):
            same_runner = self.runners.exposed is self.runners.plain
            shown = candidate if same_runner else self.replay.feed(self.runners.exposed, case)
            given = shown.selections
        expected = self._expected(case, given)
        result = CaseResult(case.name, self.layout)
        if given is not None:
            expected = self._judge_selections(result, case, expected)
        self._compare(result, candidate, expected)
        if any(quantity.may_be_chance for quantity in result.quantities if not quantity.passed):
            self._compare(result, candidate, expected, more=True)
        result.failures += [_failure(quantity) for quantity in result.quantities if not quantity.passed]
        if OUTPUTS[self.manifest.task] == "logits":  # features are no distribution
            _compare_choices(result, case, candidate, expected)
        return result

    def _expected(self, case: Case, given: Sequence[Selections] | None) -> Expected:
        return self.oracle.expected(self.layout, self.replay, case, given)

    def _judge_selections(self, result: CaseResult, case: Case, expected: Expected) -> Expected:
        """Sets of keys and experts; returns what the numbers are to be compared with."""
        result.tied_rows = expected.differing
        if case.exact and _clear(expected):
            result.selected = "exact"
            if expected.differing:
                result.failures.append(f"{expected.differing} rows select other keys or experts than the reference")
            return expected
        result.selected = "certificate"
        expected = expected.followed()
        for name, amount in expected.violation.items():
            allowed = expected.epsilon[name]
            if amount > allowed:
                result.failures.append(
                    f"{name}: the selection is not a best one by {amount:.3g} (allowed {allowed:.3g})"
                )
        return expected

    def _compare(
        self, result: CaseResult, candidate: CandidateTrace, expected: Expected, *, more: bool = False
    ) -> None:
        """Every tensor against the reference, by its noise: that of one draw, or of `more`."""
        result.quantities.clear()
        for name in (OUTPUTS[self.manifest.task], *candidate.present):
            noise = expected.noise(name, more=more)
            allowed = limit(
                name.rsplit(".", 1)[-1],
                self.manifest.dtype,
                noise_max=noise.max_abs,
                noise_rms=noise.rms,
                scale=noise.scale,
                count=noise.effective,
                draws=noise.draws,
            )
            result.quantities.append(Quantity(name, expected.difference(name, candidate), allowed))


def _clear(expected: Expected) -> bool:
    """Whether the reference's own choices stand out of its noise, so that a bundle must choose the same."""
    return expected.gap > max(expected.epsilon.values(), default=0.0)


def _compare_choices(result: CaseResult, case: Case, candidate: CandidateTrace, expected: Expected) -> None:
    """Distributions of logits, and the likeliest tokens."""
    # Of a greedy text only the tokens that it continues with are of interest, not those of the prompt.
    last = result.case == GREEDY
    distribution = expected.distribution("last" if last else "all")
    result.positions, result.sample = locate(case, candidate.logits, distribution, last=last)
    if result.logits.difference.non_finite:
        return
    found = np.concatenate([rows[-1:] if last else rows for rows in candidate.logits])
    result.kl = kl_divergence(found, distribution)
    result.top1 = top1(found, distribution)
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
