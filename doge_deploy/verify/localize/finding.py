"""What the localiser found, and how it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from doge_deploy.errors import MismatchError
from doge_deploy.graph.stages import LAST_POINTS, place, split_point, stage_of
from doge_deploy.verify.compare import Difference
from doge_deploy.verify.tolerance import AllowedDifference

REASONS = (
    "wrong weight",
    "fp16 overflow",
    "NaN origin",
    "denormal",
    "wrong selection",
    "tie",
    "wrong input",
    "other arithmetic",
)
"""Why a stage errs; `other arithmetic` where its weights and its inputs are right and its numbers are not."""

NOISE = "noise"
VANISHED = "vanished"
"""Why a case fails though no stage errs."""


@dataclass(frozen=True)
class Measure:
    """A stage's numbers against the reference's."""

    difference: Difference
    allowed: AllowedDifference

    @property
    def passed(self) -> bool:
        return self.difference.within(self.allowed)

    @property
    def error(self) -> float:
        return self.difference.max_abs

    @property
    def load(self) -> float:
        """How much of what noise explains is used, 1 being all."""
        if self.difference.non_finite:
            return float("inf")
        pairs = ((self.difference.max_abs, self.allowed.max_abs), (self.difference.rms, self.allowed.rms))
        return max(found / allowed if allowed else (float("inf") if found else 0.0) for found, allowed in pairs)


@dataclass(frozen=True)
class Choice:
    """A set of keys or experts against the best one."""

    rows: int
    """In which another set was chosen."""
    violation: float
    """How far the worst of them is from a best one; 0: the sets differ among equals."""
    example: str
    """One such row, in words."""

    @property
    def passed(self) -> bool:
        return self.rows == 0


@dataclass(frozen=True)
class Reading:
    """One point in one call and one column."""

    call: int
    point: str
    column: str
    own: Measure | Choice | None
    """Of the stage alone, on the reference's input."""
    inherited: Measure | None
    """Of the run as a whole; None where the point is not shown, or a set."""

    @property
    def order(self) -> tuple[int, float, int]:
        layer, name = split_point(self.point)
        outside = float("inf") if name in LAST_POINTS else -1.0
        return self.call, outside if layer is None else layer, place(self.point)

    @property
    def errs(self) -> bool:
        return self.own is not None and not self.own.passed


@dataclass(frozen=True)
class Finding:
    """The first stage that errs, and why."""

    case: str
    """`<layout>/<case>`."""
    call: int
    layer: int | None
    stage: str
    columns: tuple[str, ...]
    """In which it errs: `standard`, `lowered` or both."""
    error: float
    """Largest own error, in the first of the columns; of a selection how far it is from a best one."""
    noise: float
    """What noise explains."""
    reason: str
    """One of `REASONS`, `NOISE` or `VANISHED`."""
    detail: str
    """The reason in words."""
    fault_of: str
    """The weight file, the standard graph, or the passes that made this part of the lowered graph."""

    @property
    def place(self) -> str:
        where = f"{self.case}, call {self.call}"
        return where if self.layer is None else f"{where}, layer {self.layer}"

    def __str__(self) -> str:
        if self.reason in (NOISE, VANISHED):
            return f"{self.case}: {self.detail}"
        return (
            f"{self.place}, stage `{self.stage}`: own error {self.error:.1e} (noise explains {self.noise:.1e}); "
            f"everything before it is within noise"
        )


@dataclass
class Localization:
    """Everything that the localiser saw of a case."""

    case: str
    """`<layout>/<case>`; empty where every case passed and none was asked for."""
    columns: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    """What `verify` found of the case."""
    finding: Finding | None = None
    """None: there is nothing to find."""
    readings: list[Reading] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.finding is None and not self.failures

    def require_passed(self) -> None:
        """Raises MismatchError with the finding, or with what `verify` found, where `passed` is false."""
        if not self.passed:
            raise MismatchError(str(self.finding) if self.finding else f"{self.case}: {'; '.join(self.failures)}")

    def errs(self) -> list[Reading]:
        """Readings of all stages that err by themselves, in order."""
        return sorted((reading for reading in self.readings if reading.errs), key=lambda reading: reading.order)

    def table(self) -> list[Reading]:
        """Readings of the layer and call of the finding; empty where there is no such place."""
        if self.finding is None or self.finding.reason in (NOISE, VANISHED):
            return []
        place_of = (self.finding.call, self.finding.layer)
        found = [one for one in self.readings if (one.call, split_point(one.point)[0]) == place_of]
        return sorted(found, key=lambda reading: reading.order)

    def lines(self) -> list[str]:
        """The finding in words, a line each."""
        if self.finding is None:
            if not self.case:
                return ["nothing to find: every case is within tolerance"]
            return [f"{self.case}: nothing to find: every stage of every call is within noise", *self.notes]
        found = self.finding
        if found.reason in (NOISE, VANISHED):
            return [str(found), *self.notes]
        return [
            str(found),
            f"  column: {_columns(found.columns, self.columns)}",
            f"  reason: {found.reason}: {found.detail}",
            f"  fault of: {found.fault_of}",
            *(f"  {note}" for note in self.notes),
        ]


def _columns(bad: Sequence[str], known: Sequence[str]) -> str:
    good = [name for name in known if name not in bad]
    return f"{' and '.join(bad)} graph" + (f"; the {' and '.join(good)} graph is within noise there" if good else "")


_TWINS = {"rope_q": "q", "rope_k": "k", "mlp_residual": "mlp", "expert_selection": "experts"}


def word(reading: Reading) -> str:
    """The stage of a reading; two stages of the same name are told apart by their point."""
    name = split_point(reading.point)[1]
    stage = stage_of(reading.point)
    return f"{stage} ({_TWINS[name]})" if name in _TWINS else stage
