"""Numbers of 4 bits whose errors the following columns of a row make up for.

A product of a row w, stored as v, with an input x errs by (w - v) x; the mean of the square is (w - v) H (w - v)^T, H
being the covariance of the inputs. Columns are rounded one after the other; what is lost in one is taken from those
that are still to come, as far as the inputs of the two vary together. With H^-1 = U^T U, U upper triangular, the errors
of the columns, each over its diagonal number of U, are (w - v) U^-1, and the sum of their squares is what a row loses;
so a block's scale is chosen, and fitted to its numbers, by that.

Reference: Frantar et al. 2022, "GPTQ", https://arxiv.org/abs/2210.17323 (rounding with a fixed order of columns).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from doge_deploy.graph.weight_formats._scales import HIGHEST, LOWEST, STARTS, short_scale

if TYPE_CHECKING:
    import torch

DAMPENING = 0.3
"""Added to the diagonal of a covariance, times its mean: a short text shows the inputs only roughly (decision 44)."""


def scales_with_feedback(
    weight: torch.Tensor, covariance: torch.Tensor, block: int, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from -8 to 7 and the scale of each block, as `positive_scales` gives them.

    Blocks are rounded in the order of their inputs' mean square, the largest first, and so are the columns of a block.

    Args:
        weight: `[N, C]` float32.
        covariance: of the inputs, `[C, C]` float64.
        block: numbers that share a scale; it divides C.
        dtype: of the scales, see `positive_scales`.

    Returns:
        Numbers `[N, C]` float32 and scales `[N, C/block]` of `dtype`.
    """
    import torch

    columns = weight.shape[1]
    order = column_order(covariance, block)
    upper = factor(covariance[order][:, order])
    left = weight.to(torch.float64)[:, order]
    values, scales = torch.empty_like(left), left.new_empty(len(left), columns // block)
    for begin in range(0, columns, block):
        end = begin + block
        own = upper[begin:end, begin:end]
        found, scale = _round_block(left[:, begin:end], own, dtype)
        values[:, begin:end], scales[:, begin // block] = found, scale
        errors = torch.linalg.solve_triangular(own, left[:, begin:end] - found * scale[:, None], upper=True, left=False)
        left[:, end:] -= errors @ upper[begin:end, end:]
    numbers, all_scales = torch.empty_like(values), torch.empty_like(scales)
    numbers[:, order] = values
    all_scales[:, order[::block] // block] = scales
    return numbers.float(), all_scales.to(getattr(torch, dtype))


def column_order(covariance: torch.Tensor, block: int) -> torch.Tensor:
    """`[C]`: columns in the order in which they are rounded; those of a block stay together."""
    power = covariance.diagonal().reshape(-1, block)
    blocks = power.sum(-1).argsort(dim=-1, descending=True, stable=True)
    inside = power.argsort(dim=-1, descending=True, stable=True)
    order: torch.Tensor = (blocks[:, None] * block + inside[blocks]).reshape(-1)
    return order


def factor(covariance: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with U^T U the inverse of the dampened covariance, `[C, C]`; where all inputs are zero, the
    identity.
    """
    import torch

    mean = covariance.diagonal().mean()
    unit = torch.eye(len(covariance), dtype=torch.float64)
    if not mean > 0:
        return unit
    dampened = covariance / mean + DAMPENING * unit
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(dampened))
    found: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return found


def _round_block(left: torch.Tensor, upper: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers `[N, block]` and scales `[N]`, float64, of the columns of one block in their order.

    Args:
        left: what the columns are to stand for, the errors of earlier blocks made up for.
        upper: the part of U that belongs to the block.
    """
    import torch

    whole = torch.maximum(left.amax(-1) / HIGHEST, left.amin(-1) / LOWEST)
    scale = short_scale(whole * torch.tensor(STARTS, dtype=torch.float64)[:, None], dtype).to(torch.float64)  # [S, N]
    unit = torch.eye(len(upper), dtype=torch.float64)
    seen = torch.linalg.solve_triangular(upper, unit, upper=True)
    target = left @ seen
    found = []
    for _ in range(2):
        values, loss = _round_columns(left, scale, upper)
        found.append((loss, values, scale))
        weighed = values @ seen
        fitted = (weighed * target).sum(-1) / weighed.square().sum(-1)
        scale = short_scale(torch.where(fitted > 0, fitted, scale), dtype).to(torch.float64)
    losses, values, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    best = losses.argmin(0)
    rows = torch.arange(len(left))
    chosen, chosen_scale = values[best, rows], scales[best, rows]
    nothing = (chosen == 0).all(-1)
    return chosen, torch.where(nothing, torch.ones_like(chosen_scale), chosen_scale)


def _round_columns(left: torch.Tensor, scale: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers `[S, N, block]` and the loss `[S, N]` for scales `[S, N]`."""
    import torch

    rest = left.T[:, None].repeat(1, len(scale), 1)  # [block, S, N]: a column is one piece of memory
    values, loss = torch.empty_like(rest), torch.zeros_like(scale)
    for column in range(len(rest)):
        values[column] = torch.clamp(torch.round(rest[column] / scale), LOWEST, HIGHEST)
        error = (rest[column] - values[column] * scale) / upper[column, column]
        loss += error.square()
        rest[column + 1 :] -= upper[column, column + 1 :, None, None] * error
    return values.permute(1, 2, 0), loss
