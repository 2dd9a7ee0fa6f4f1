"""The noise of the reference's arithmetic, and more draws of it where one draw may have been lucky.

One run of the reference is one draw of its rounding errors. Where an input is ill conditioned (a query near zero before
its norm, say), a handful of roundings make nearly all of the error, and that one draw may be far smaller than the
next; `rounding.py` makes more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from doge_deploy.verify.compare import Difference

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
    """How many errors of equal size would scatter as these do, see `Difference.effective`."""


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
