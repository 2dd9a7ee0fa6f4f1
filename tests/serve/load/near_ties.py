"""Which tokens a sampler may pick where logits are known to within a distance only.

A drawn token is decided by one number u of 0 to 1: it is the first whose cumulative probability exceeds u. Where every
score may lie up to `noise` above or below what is known, the boundaries of each token's share lie in intervals, and the
token is possible where u is between the lowest place of its lower and the highest of its upper boundary. What is left
out (top-k, top-p, min-p) may change too, for tokens whose score is within twice the noise of what decides about them.

Each interval is one that no scores within the noise leave; it may be a little wider than need be, since the worst case
of one boundary need not be that of the other.

Axes: V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from doge_deploy.options.generation import SamplingOptions

Scores = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_ROUNDING = 1e-9
"""Of sums of float64, in probabilities."""


def possible_tokens(options: SamplingOptions, scores: Scores, noise: float, u: float) -> list[int]:
    """Ids that the sampler picks from some scores within `noise` of `scores` `[V]`, ascending.

    Args:
        options: how it is drawn.
        scores: logits with biases and penalties; -inf is a token that is ruled out.
        noise: at least 0.
        u: the random number, 0 to 1; not looked at where nothing is drawn.
    """
    scores = np.asarray(scores, np.float64)
    if not options.do_sample:
        return np.flatnonzero(scores >= scores.max() - 2 * noise).tolist()
    order = np.argsort(-scores, kind="stable")
    order = order[: int((scores > -np.inf).sum())]
    shown = scores[order]
    above, below = _edges(shown, 2 * noise)
    low = np.exp((shown - shown[0] - noise) / options.temperature)
    high = np.exp((shown - shown[0] + noise) / options.temperature)
    certain, possible = _kept(options, shown, low, high, above, below, noise)
    low, high = np.where(certain, low, 0.0), np.where(possible, high, 0.0)
    if options.top_p >= 1:  # tokens are drawn in the order of their ids
        place = np.argsort(order)
        before_low, before_high = _before(low[place]), _before(high[place])
        after_low, after_high = low.sum() - before_low - low[place], high.sum() - before_high - high[place]
        ids, own, may = order[place], high[place], possible[place]
    else:  # likeliest first; of two that may change places either may come first
        sums_low, sums_high = np.append(0.0, np.cumsum(low)), np.append(0.0, np.cumsum(high))
        before_low, before_high = sums_low[above], sums_high[below] - high
        after_low, after_high = sums_low[-1] - sums_low[below], sums_high[-1] - sums_high[above] - high
        ids, own, may = order, high, possible
    with np.errstate(invalid="ignore"):  # 0 / 0 of a token that is never kept
        lowest = before_low / (before_low + own + np.maximum(after_high, 0.0))
        highest = (before_high + own) / (before_high + own + np.maximum(after_low, 0.0))
    found = may & (lowest <= u + _ROUNDING) & (highest >= u - _ROUNDING)
    return sorted(ids[found].tolist())


def _before(weights: Scores) -> Scores:
    return np.cumsum(weights) - weights


def _edges(shown: Scores, distance: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of scores `[n]` in descending order: how many are larger than each by more than `distance`, and how many are not
    smaller by more than that.
    """
    above = np.searchsorted(-shown, -(shown + distance), side="left")
    below = np.searchsorted(-shown, -(shown - distance), side="right")
    return above, below


def _kept(
    options: SamplingOptions,
    shown: Scores,
    low: Scores,
    high: Scores,
    above: npt.NDArray[np.int64],
    below: npt.NDArray[np.int64],
    noise: float,
) -> tuple[Mask, Mask]:
    """Which of the scores `[n]`, in descending order, the sampler keeps in any case, and which it may keep."""
    certain, possible = np.ones(len(shown), bool), np.ones(len(shown), bool)
    if 0 < options.top_k < len(shown):
        edge = shown[options.top_k - 1]
        certain &= shown >= edge + 2 * noise if noise else shown >= edge
        possible &= shown >= edge - 2 * noise
    if options.top_p < 1:
        # a token is kept while those that are likelier hold less than top_p
        low_kept, high_kept = np.where(certain, low, 0.0), np.where(possible, high, 0.0)
        sums_low, sums_high = np.append(0.0, np.cumsum(low_kept)), np.append(0.0, np.cumsum(high_kept))
        least = sums_low[above] / (sums_low[above] + sums_high[-1] - sums_high[above])
        rest = np.maximum(sums_low[-1] - sums_low[below], 0.0)
        likelier = sums_high[below] - high_kept
        most = likelier / np.maximum(likelier + low_kept + rest, 1e-300)
        certain &= most < options.top_p - _ROUNDING
        possible &= least < options.top_p + _ROUNDING
    if options.min_p > 0:
        edge = shown[0] + options.temperature * math.log(options.min_p)
        certain &= shown >= edge + 2 * noise + _ROUNDING
        possible &= shown >= edge - 2 * noise - _ROUNDING
    certain[0] = possible[0] = True  # the likeliest is always kept, whatever it is
    possible |= shown >= shown[0] - 2 * noise
    if noise:
        certain[0] = bool(len(shown) == 1 or shown[1] < shown[0] - 2 * noise)
    return certain, possible
