"""Positive scales of blocks of 4-bit numbers, chosen for the least squared error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOWEST, HIGHEST = -8, 7

STARTS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
"""Fractions of a block's range that are tried, each with the scale that is then best for its numbers."""

NUMBER_BITS = 3
"""Bits of 7, the widest number; -8 is a power of two."""

SIGNIFICANT_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}

SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
"""The smallest scale: positive in the dtype, and not flushed to zero."""


def positive_scales(blocks: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from -8 to 7 and the scale of each block.

    Args:
        blocks: `[N, blocks, block]` float32.
        dtype: of the scales: float32, float16 or bfloat16. They have `NUMBER_BITS` fewer bits than it, so that number
            times scale is exact in it.

    Returns:
        Numbers `[N, blocks, block]` float32 and scales `[N, blocks]` of `dtype`, all above zero. A block of zeros has
        scale 1.
    """
    import torch

    high, low = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    whole = torch.maximum(high / HIGHEST, low / LOWEST)
    best = best_values = best_scale = None
    for start in STARTS:
        scale = short_scale(whole * start, dtype)
        for _ in range(2):
            values = torch.clamp(torch.round(blocks / scale), LOWEST, HIGHEST)
            error = (values * scale - blocks).square().sum(-1, keepdim=True)
            if best is None or best_values is None or best_scale is None:
                best, best_values, best_scale = error, values, scale
            else:
                better = error < best
                best = torch.where(better, error, best)
                best_values = torch.where(better, values, best_values)
                best_scale = torch.where(better, scale, best_scale)
            fitted = (values * blocks).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True)
            scale = short_scale(torch.where(fitted > 0, fitted, scale), dtype)
    assert best_values is not None and best_scale is not None
    nothing = (best_values == 0).all(-1, keepdim=True)
    best_scale = torch.where(nothing, torch.ones_like(best_scale), best_scale)
    return best_values, best_scale.squeeze(-1).to(getattr(torch, dtype))


def short_scale(scale: torch.Tensor, dtype: str) -> torch.Tensor:
    """The nearest number above zero that has `NUMBER_BITS` fewer bits than `dtype`, is one of `dtype`, and does not
    leave its range when it is multiplied.
    """
    import torch

    bits = SIGNIFICANT_BITS[dtype] - NUMBER_BITS
    mantissa, exponent = torch.frexp(scale)
    short = torch.ldexp(torch.round(mantissa * 2**bits), exponent - bits)
    kind: torch.dtype = getattr(torch, dtype)
    largest = 2.0 ** math.floor(math.log2(torch.finfo(kind).max)) * (2 - 2.0 ** (1 - bits)) / -LOWEST
    return short.clamp(SMALLEST[dtype], largest).to(kind).float()
