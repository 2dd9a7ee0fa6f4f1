"""The noise of the reference's arithmetic, and more draws of it where one draw may have been lucky.

One run of the reference is one draw of its rounding errors. Where an input is ill conditioned (a query near zero before
its norm, say), a handful of roundings make nearly all of the error, and that one draw may be far smaller than the
next; `rounding.py` makes more of them. They also show what a single run cannot: which errors come and go together. The
logits of one position all follow a few directions of its hidden state, and a thousand numbers are then but two or three
independent errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from doge_deploy.verify.compare import Array, Difference, difference

DRAWS = 8
"""Runs of the reference that are added to the first where it did not suffice."""

MOST_BY_CHANCE = 40.0
"""Times its limit: what differs by more is not tried again. A single error, which is the smallest sample there is,
passes this factor once in ten thousand times (`small_sample_factor`)."""


@dataclass(frozen=True)
class Noise:
    """Of one tensor in one case."""

    max_abs: float
    rms: float
    scale: float
    """Largest absolute number of the reference."""
    effective: float
    """How many independent errors of equal size would scatter as those of one run do: see `Difference.effective`, which
    is all that is known of a single draw, and `independent_errors`."""
    draws: int = 1
    """Runs that `rms` was measured on."""


def pool(draws: Sequence[Difference]) -> Noise:
    """Draws of the same tensor as one sample of noise.

    Raises:
        ValueError: there is no draw.
    """
    squares = [draw.rms**2 for draw in draws]  # of equally many numbers each
    fourths = [square**2 / draw.effective for square, draw in zip(squares, draws, strict=True) if square]
    return Noise(
        max_abs=max(draw.max_abs for draw in draws),
        rms=(sum(squares) / len(draws)) ** 0.5,
        scale=max(draw.scale for draw in draws),
        effective=sum(squares) ** 2 / sum(fourths) if fourths else sum(draw.effective for draw in draws),
    )


def noise_of(draws: Sequence[list[Array]], exact: list[Array]) -> Noise:
    """The noise that draws of one tensor show, rows of a batch each.

    Args:
        draws: the tensor in each run of the reference.
        exact: the same in the next wider dtype.

    Raises:
        ValueError: there is no draw, or shapes differ.
    """
    pooled = pool([difference(draw, exact) for draw in draws])
    if len(draws) == 1:
        return pooled
    effective = min(pooled.effective / len(draws), independent_errors(draws, exact))
    return replace(pooled, effective=max(effective, 1.0), draws=len(draws))


def independent_errors(draws: Sequence[list[Array]], exact: list[Array]) -> float:
    """How many independent errors of equal size would make a mean square that scatters as that of these draws does.

    It is (tr C)^2 / tr C^2 of the errors' covariance C (Satterthwaite 1946, Box 1954), in the estimate that is without
    bias for few draws of many numbers (Bai and Saranadasa 1996, equation 3.4). Infinite where they show no correlation.

    Args:
        draws: three or more.
        exact: see `noise_of`.
    """
    count = len(draws) - 1
    products = np.zeros((len(draws), len(draws)))
    for rows in zip(exact, *draws, strict=True):
        flat = [row.reshape(-1) for row in rows]
        for begin in range(0, flat[0].size, _BLOCK):
            part = [row[begin : begin + _BLOCK].astype(np.float64) for row in flat]
            errors = np.stack(part[1:]) - part[0]
            errors -= errors.mean(axis=0)  # what all draws share is no chance
            products += errors @ errors.T
    trace, of_square = float(products.trace()) / count, float(np.square(products).sum()) / count**2
    of_square = count**2 / ((count - 1) * (count + 2)) * (of_square - trace**2 / count)
    return (trace**2 - 2 * of_square / count) / of_square if of_square > 0 else math.inf


_BLOCK = 2**18
"""Numbers of every draw that are multiplied at once."""
