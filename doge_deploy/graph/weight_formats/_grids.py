"""What a block of 4-bit numbers may be rounded to: which scales and zero points there are, and which are tried first.

A number of a grid is a whole number v with `lowest <= v <= lowest + 15`, and stands for v times the scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from doge_deploy.graph.weight_formats._scales import HIGHEST, LOWEST, STARTS, short_scale

if TYPE_CHECKING:
    import torch

WIDE_SCALE_BITS = 11
"""Significant bits of a scale that is stored in float32. The fewer there are, the more seldom one comes out otherwise
where sums are added in another order; and number times scale is exact (decision 52)."""

STEPS = HIGHEST - LOWEST


class Grid(ABC):
    """The scales and zero points that blocks of one format have. Shapes: S starts, N rows.

    Args:
        dtype: of stored scales: float32, float16 or bfloat16.
    """

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype

    @abstractmethod
    def starts(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales to begin with, and the lowest numbers that go with each, both `[S, N]` float64.

        Args:
            left: what the numbers of a block are to stand for, `[N, block]` float64.
        """

    @abstractmethod
    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest legal scales, float64; of a number that is not zero one of the same sign."""


class PositiveGrid(Grid):
    """Numbers from -8 to 7, and scales above zero: int4 in half precision."""

    def starts(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        whole = torch.maximum(left.amax(-1) / HIGHEST, left.amin(-1) / LOWEST)
        scale = self.nearest(whole * _fractions())
        return scale, torch.full_like(scale, LOWEST)

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        import torch

        return short_scale(scale, self.dtype).to(torch.float64)


class EitherSignGrid(Grid):
    """Numbers from -8 to 7, and scales of either sign: the number of largest magnitude can have the level more."""

    def starts(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        high, low = left.amax(-1), left.amin(-1)
        scale = self.nearest(torch.where(high > -low, high, low) / LOWEST * _fractions())
        return scale, torch.full_like(scale, LOWEST)

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        import torch

        size = short_scale(scale.abs(), self.dtype, WIDE_SCALE_BITS).to(torch.float64)
        return torch.where(scale < 0, -size, size)


class ZeroPointGrid(Grid):
    """Sixteen whole numbers with zero among them, and scales above zero."""

    def starts(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        high, low = left.amax(-1).clamp(min=0) * _fractions(), left.amin(-1).clamp(max=0) * _fractions()
        scale = self.nearest((high - low) / STEPS)
        return scale, torch.clamp(torch.round(low / scale), -STEPS, 0)

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        import torch

        return short_scale(scale, self.dtype, WIDE_SCALE_BITS).to(torch.float64)


def _fractions() -> torch.Tensor:
    """`STARTS` as `[S, 1]` float64."""
    import torch

    return torch.tensor(STARTS, dtype=torch.float64)[:, None]
