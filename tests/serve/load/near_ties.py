"""Which tokens a sampler may pick where the same tokens, fed in other ways, give slightly other logits.

What decides is measured in each of some ways (W), and a token is possible where one more way, somewhat further from
them than they are from each other, may decide for it:

- greedy: how far the token is below the best one. It is possible where that distance, at its smallest and less half
  the range that it has among the ways, is not above zero;
- drawn: a number u of 0 to 1 picks the token between whose two boundaries, in the cumulative probabilities, it lies. It
  is possible where u is not outside of the boundaries at their furthest, each moved by half the range that it has.

Where all ways agree to the last bit, nothing but what they pick is possible.

Axes: W ways, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from doge_deploy.runtime.sampling import Sampler

BEYOND = 0.5
"""Of a range, so much is added on each side: a few ways do not show the furthest one."""

Rows = Sequence[npt.NDArray[np.float32]]


def possible_tokens(sampler: Sampler, rows: Rows, context: Sequence[int], u: float) -> list[int]:
    """Ids that may be picked, ascending; all that the sampler picks from one of the ways are among them.

    Args:
        sampler: its options are looked at, its random numbers are not used.
        rows: logits `[V]` of each way.
        context: tokens of prompt and output so far.
        u: the random number of this token, 0 to 1; not looked at where nothing is drawn.
    """
    if not sampler.options.do_sample:
        scores = np.stack([sampler.scores(row, context) for row in rows]).astype(np.float64)
        with np.errstate(invalid="ignore"):  # what is ruled out is infinitely far in every way
            below = scores.max(axis=1, keepdims=True) - scores
            least = below.min(axis=0) - BEYOND * np.ptp(below, axis=0)
        return np.flatnonzero(least <= 0).tolist()
    lower = np.full((len(rows), len(rows[0])), np.nan)
    upper = lower.copy()
    for way, row in enumerate(rows):
        ids, probabilities = sampler.distribution(row, context)
        ends = np.cumsum(probabilities)
        upper[way, ids] = ends / ends[-1]
        lower[way, ids] = np.append(0.0, ends[:-1]) / ends[-1]
    kept = np.flatnonzero(~np.isnan(upper).all(axis=0))  # a token that no way keeps cannot be drawn
    lower, upper = lower[:, kept], upper[:, kept]
    first = np.nanmin(lower, axis=0) - BEYOND * (np.nanmax(lower, axis=0) - np.nanmin(lower, axis=0))
    last = np.nanmax(upper, axis=0) + BEYOND * (np.nanmax(upper, axis=0) - np.nanmin(upper, axis=0))
    return kept[(first <= u) & (u < last)].tolist()
