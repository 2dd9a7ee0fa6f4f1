"""What a verification found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from doge_deploy.errors import MismatchError
from doge_deploy.verify.baseline import Comparison
from doge_deploy.verify.environment import Environment
from doge_deploy.verify.oracle import SelfDifference, WeightsResult
from doge_deploy.verify.parity import CaseResult
from doge_deploy.verify.quality import QualityResult

MOST_NAMES = 6
"""Cases that a verdict names."""


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
    bundle_sha256: str = ""
    """Of its manifest, which holds the hashes of all its files."""
    task: str = "causal-lm"
    checkpoint: str = ""
    """Where the bundle came from, and the hash of its weights."""
    environment: Environment | None = None
    """What it was made with."""
    command: str = ""
    """By which the same report can be made; empty where none was."""
    baseline: Comparison | None = None
    """How much of the tolerances an earlier report used."""
    localized: tuple[str, ...] = ()
    """What the localiser says, a line each; empty where it was not asked."""

    recording: str | None = None
    """What took the place of the reference, for people; None where that ran here."""

    @property
    def failed_cases(self) -> list[str]:
        """`weights`, and `<layout>/<case>`."""
        failed = [] if self.weights.passed else ["weights"]
        failed += [f"{result.layout}/{result.case}" for result in self.results if not result.passed]
        return failed + [f"{result.layout}/quality" for result in self.quality if not result.passed]

    @property
    def drifted(self) -> bool:
        """Whether a case uses too much more of its tolerance than it did in the baseline."""
        return self.baseline is not None and not self.baseline.passed

    @property
    def passed(self) -> bool:
        return bool(self.results) and not self.failed_cases and not self.drifted

    @property
    def verdict(self) -> str:
        """In a sentence, which names the first of many cases."""
        return self._verdict(MOST_NAMES)

    def _verdict(self, most: int | None) -> str:
        """With at most so many names."""
        passed = f"{sum(result.passed for result in self.results)} of {len(self.results)} cases within tolerance"
        if self.passed:
            return f"computes what {self.reference} computes: {passed}"
        failed = self.failed_cases
        if failed or self.baseline is None:
            return f"does not compute what {self.reference} computes: {_names(failed, most) or passed}"
        drifts = [drift.case for drift in self.baseline.drifts]
        return f"computes what {self.reference} computes, but drifts from {self.baseline.name}: {_names(drifts, most)}"

    def require_passed(self) -> None:
        """Raises MismatchError with the names of the cases that failed or drifted, where `passed` is false."""
        if not self.passed:
            raise MismatchError(f"{self.bundle} {self._verdict(None)}")


def _names(names: Sequence[str], most: int | None) -> str:
    shown = list(names[:most])
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
