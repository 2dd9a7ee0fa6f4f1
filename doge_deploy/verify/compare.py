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


def largest_error(one: list[Array], two: list[Array]) -> float:
    """Largest absolute error of two lists of arrays of equal shapes; infinite where only one of them is NaN."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        error = np.abs(a.astype(np.float64) - b.astype(np.float64))
        error[np.isnan(error)] = np.inf
        error[np.isnan(a) & np.isnan(b)] = 0.0
        worst = max(worst, float(error.max(initial=0.0)))
    return worst


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


@dataclass(frozen=True)
class Distribution:
    """What is known of the reference's distributions of tokens; axes: T positions, m tokens that are known of each."""

    ids: Array
    """`[T, m]` int64: the likeliest token is among them, and no token twice."""
    logits: Array
    """`[T, m]`."""
    weights: Array
    """`[T, m]`: how many tokens of the vocabulary each stands for; 1 where all are known."""
    normalizer: Array
    """`[T]`: logarithm of the sum of the exponentials of all logits."""

    @classmethod
    def whole(cls, logits: Array) -> Distribution:
        """Of logits `[T, V]`: everything is known."""
        ids = np.broadcast_to(np.arange(logits.shape[1]), logits.shape)
        return cls(ids, logits, np.ones((1, 1)), _log_sum_exp(logits))

    @property
    def best(self) -> Array:
        """`[T]`: the likeliest token, the lowest of equals."""
        tied = self.logits == self.logits.max(axis=1, keepdims=True)
        result: Array = np.where(tied, self.ids, np.iinfo(np.int64).max).min(axis=1)
        return result

    def logit(self, tokens: Array) -> Array:
        """`[T]`: logits of `tokens` `[T]`; of a token that is not known the least of those that are, which it may be
        below.
        """
        known = self.ids == tokens[:, None]
        found = np.where(known, self.logits, -np.inf).max(axis=1)
        result: Array = np.where(known.any(axis=1), found, self.logits.min(axis=1))
        return result


def divergences(candidate: Array, reference: Distribution) -> Array:
    """KL(reference || candidate) of every position `[T]`, in nats, of logits `[T, V]`.

    Where the reference is known in part, tokens stand for others, and the sum is an estimate of that of all.
    """
    p = reference.logits.astype(np.float64) - reference.normalizer[:, None]
    q = np.take_along_axis(candidate.astype(np.float64), reference.ids, axis=1) - _log_sum_exp(candidate)[:, None]
    # Over all tokens the last two terms add up to nothing; with them no term is negative, and an estimate is good.
    result: Array = (reference.weights * (np.exp(p) * (p - q) - np.exp(p) + np.exp(q))).sum(axis=-1)
    return result


def kl_divergence(candidate: Array, reference: Distribution) -> float:
    """The largest of `divergences`."""
    return float(divergences(candidate, reference).max()) if len(candidate) else 0.0


def _log_sum_exp(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    largest = wide.max(axis=-1, initial=-np.inf)
    result: Array = largest + np.log(np.exp(wide - largest[:, None]).sum(axis=-1))
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


def top1(candidate: Array, reference: Distribution) -> Top1:
    """Compare the argmax of logits `[T, V]`, lowest index among equals."""
    a, b = candidate.argmax(axis=-1), reference.best
    differing = np.flatnonzero(a != b)
    if not len(differing):
        return Top1(len(a), len(a), None, None)
    # The worst margin decides, the first position is what a user looks at.
    margins = (reference.logit(b) - reference.logit(a))[differing].astype(np.float64)
    return Top1(len(a) - len(differing), len(a), int(differing[0]), float(margins.max()))
