"""How much of its tolerances a bundle used earlier: drift inside of a tolerance is how a regression begins.

The share of a case is that of its worst tensor. A case drifts where it uses more than twice the share of then, and more
than the reference's own noise: a tolerance is a multiple of that noise, so below this share a difference cannot be told
from what another order of the same sums makes, and a share of zero (which a bundle in float16 has at times) would
double by any change at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_deploy.errors import UsageError
from doge_deploy.verify.tolerance import TOLERANCES, share_text

if TYPE_CHECKING:
    from doge_deploy.verify.parity import CaseResult

FACTOR = 2.0
"""Times the share of then that a case may use."""

FLOOR = 1 / TOLERANCES["logits"].factor_rms
"""Share of a tolerance that the reference's own noise makes: every case may use that much."""


@dataclass(frozen=True)
class Baseline:
    """An earlier report, as far as it matters here."""

    name: str
    """Of its file."""
    dtype: str
    loads: Mapping[str, float]
    """Per `<layout>/<case>` the share of its tolerance that it used."""

    def check_dtype(self, dtype: str) -> None:
        """Raises UsageError for a bundle of another dtype: shares of another noise say nothing of it."""
        if dtype != self.dtype:
            raise UsageError(f"--baseline {self.name} is of a bundle in {self.dtype}, this one is in {dtype}")


@dataclass(frozen=True)
class Drift:
    """A case that uses too much more of its tolerance than it did."""

    case: str
    """`<layout>/<case>`."""
    tensor: str
    """That uses it now."""
    before: float
    now: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.case}: {self.tensor} uses {share_text(self.now)} of its tolerance; the case used "
            f"{share_text(self.before)} before (allowed {share_text(self.allowed)})"
        )


@dataclass(frozen=True)
class Comparison:
    """A report compared with a baseline."""

    name: str
    """Of the baseline's file."""
    compared: int
    """Cases that both have."""
    drifts: tuple[Drift, ...]
    missing: tuple[str, ...]
    """Cases of the baseline that were not judged now."""
    new: tuple[str, ...]
    """Cases that the baseline does not know."""

    @property
    def passed(self) -> bool:
        return not self.drifts


def read_baseline(path: str | Path) -> Baseline:
    """Read a report that `verify --json` wrote.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    path = Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        loads = {f"{case['layout']}/{case['case']}": _load(case["load"]) for case in report["cases"]}
        baseline = Baseline(path.name, str(report["dtype"]), loads)
    except OSError as error:
        raise UsageError(f"--baseline {path} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"--baseline {path} is not a report of `doge-deploy verify --json`: {what}") from error
    if not loads:
        raise UsageError(f"--baseline {path} has no cases")
    return baseline


def _load(value: Any) -> float:
    """A share as the report has it; an infinite one is a string there."""
    load = float(value)
    if isinstance(value, bool) or not load >= 0:
        raise ValueError(f"load={value!r} is not a share")
    return load


def compare(baseline: Baseline, dtype: str, results: Sequence[CaseResult]) -> Comparison:
    """Compare judged cases with a baseline.

    Args:
        baseline: of the same model, as it was.
        dtype: of the bundle.
        results: the cases.

    Raises:
        UsageError: the baseline is of another dtype, or has none of these cases.
    """
    baseline.check_dtype(dtype)
    now = {f"{result.layout}/{result.case}": result for result in results}
    common = [name for name in now if name in baseline.loads]
    if not common:
        raise UsageError(f"--baseline {baseline.name} has none of the cases that were judged: {', '.join(now)}")
    drifts = []
    for name in common:
        before, result = baseline.loads[name], now[name]
        allowed = max(FACTOR * before, FLOOR)
        if result.load > allowed:
            drifts.append(Drift(name, result.worst.name, before, result.load, allowed))
    return Comparison(
        baseline.name,
        len(common),
        tuple(drifts),
        tuple(name for name in baseline.loads if name not in now),
        tuple(name for name in now if name not in baseline.loads),
    )
