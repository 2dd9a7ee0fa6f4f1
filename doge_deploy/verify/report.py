"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from doge_deploy.errors import MismatchError
from doge_deploy.verify.oracle import SelfDifference, WeightsResult
from doge_deploy.verify.parity import CaseResult
from doge_deploy.verify.quality import QualityResult


@dataclass
class Report:
    """Everything that was found."""

    bundle: Path
    dtype: str
    routing: str | None
    """None for a dense model."""
    reference: str
    """What the bundle was compared with, for people."""
    weights: WeightsResult
    results: list[CaseResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Cases that the bundle cannot hold, with the reason."""
    reference_itself: SelfDifference | None = None
    graphs: dict[str, str] = field(default_factory=dict)
    """Per layout the file that was run."""
    quality: list[QualityResult] = field(default_factory=list)
    """Of a bundle with quantized weights: what the rounding costs, on the graphs that were run.

    The cases are then those of the standard graph, against a reference with the same dequantized weights.
    """

    recording: str | None = None
    """What took the place of the reference, for people; None where that ran here."""

    @property
    def failed_cases(self) -> list[str]:
        """`weights`, and `<layout>/<case>`."""
        failed = [] if self.weights.passed else ["weights"]
        failed += [f"{result.layout}/{result.case}" for result in self.results if not result.passed]
        return failed + [f"{result.layout}/quality" for result in self.quality if not result.passed]

    @property
    def passed(self) -> bool:
        return bool(self.results) and not self.failed_cases

    def require_passed(self) -> None:
        """Raises MismatchError with the names of the cases that failed, where `passed` is false."""
        if not self.passed:
            failed = ", ".join(self.failed_cases)
            raise MismatchError(f"{self.bundle} does not compute what {self.reference} computes: {failed}")
