"""Measures of how two arrays differ; all arithmetic in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from doge_deploy.verify.tolerance import AllowedDifference

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """Candidate against reference, one tensor."""

    max_abs: float
    max_rel: float
    """Largest absolute error over the largest absolute number of the reference."""
    rms: float
    cosine: float
    worst_index: tuple[int, ...]
    """Where `max_abs` is; for a ragged tensor the first axis is the batch row."""
    scale: float
    """Largest absolute number of the reference."""
    effective: float
    """How many errors of equal size would scatter as these do: (sum e^2)^2 / sum e^4, 1 where one outweighs all."""
    non_finite: int
    """NaN and infinite elements of the candidate."""

    def within(self, limit: AllowedDifference) -> bool:
        return self.non_finite == 0 and self.max_abs <= limit.max_abs and self.rms <= limit.rms


def difference(candidate: list[Array], reference: list[Array]) -> Difference:
    """Compare rows of a batch, each `[...]` of its own length; raises ValueError where shapes differ.

    Non-finite elements are counted, and count as an infinite error.
    """
    worst_index: tuple[int, ...] = (0,)
    worst, squares, fourths, count = 0.0, 0.0, 0.0, 0
    dot = norm_a = norm_b = scale = 0.0
    non_finite = 0
    for row, (a, b) in enumerate(zip(candidate, reference, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"row {row}: candidate {a.shape}, reference {b.shape}")
        if not a.size:
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a)
        non_finite += int(a.size - finite.sum())
        error = np.where(finite, np.abs(a - b), np.inf)
        index = np.unravel_index(int(error.argmax()), error.shape)
        if error[index] > worst:
            worst, worst_index = float(error[index]), (row, *map(int, index))
        a = np.where(finite, a, 0.0)
        square = np.square(a - b)
        squares, fourths = squares + float(square.sum()), fourths + float(np.square(square).sum())
        dot, norm_a, norm_b = dot + float((a * b).sum()), norm_a + float((a * a).sum()), norm_b + float((b * b).sum())
        scale = max(scale, float(np.abs(b).max()))
        count += a.size
    norm = np.sqrt(norm_a * norm_b)
    return Difference(
        max_abs=worst,
        max_rel=worst / scale if scale else worst,
        rms=float(np.sqrt(squares / count)) if count else 0.0,
        cosine=float(dot / norm) if norm else 1.0,
        worst_index=worst_index,
        scale=scale,
        effective=squares**2 / fourths if fourths else float(max(count, 1)),
        non_finite=non_finite,
    )


def kl_divergence(candidate: Array, reference: Array) -> float:
    """Largest KL(reference || candidate), in nats, of the distributions of logits `[T, V]`."""
    p, q = log_softmax(reference), log_softmax(candidate)
    return float((np.exp(p) * (p - q)).sum(axis=-1).max()) if len(p) else 0.0


def log_softmax(logits: Array) -> Array:
    """Log probabilities of logits `[T, V]`."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@dataclass(frozen=True)
class Top1:
    """Agreement of the most likely token."""

    agreeing: int
    total: int
    first_divergence: int | None
    """Index of the first differing position among those compared."""
    margin: float | None
    """There: the reference's logit of its own token minus that of the candidate's token."""


def top1(candidate: Array, reference: Array) -> Top1:
    """Compare the argmax of logits `[T, V]`, lowest index among equals."""
    a, b = candidate.argmax(axis=-1), reference.argmax(axis=-1)
    differing = np.flatnonzero(a != b)
    if not len(differing):
        return Top1(len(a), len(a), None, None)
    # The worst margin decides, the first position is what a user looks at.
    margins = reference[differing, b[differing]].astype(np.float64) - reference[differing, a[differing]]
    return Top1(len(a) - len(differing), len(a), int(differing[0]), float(margins.max()))
