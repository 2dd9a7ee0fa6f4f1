"""Block-wise weight-only quantization: numbers of `bits` bits with a scale, and a zero point, per block of a row.

    weight[n, c] ~ (q[n, c] - zero_point[n, c // block]) * scale[n, c // block],   0 <= q < 2**bits

Reference: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html (blocked quantization).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SHRINK = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), 8: (1.0,)}
"""Per bit width, fractions of a block's range that are tried: with few levels it pays to clip the outermost number."""


SMALLEST_BLOCK = 16
"""Numbers of a block that ONNX Runtime's operators take, at least."""


@dataclass(frozen=True)
class QuantizationScheme:
    """How weights are quantized."""

    bits: int
    """4 or 8."""
    block_size: int
    """Numbers of a row that share a scale, at most: a power of two from `SMALLEST_BLOCK` up."""
    symmetric: bool
    """The zero point is the middle of the range; else each block has its own."""

    def block(self, columns: int) -> int | None:
        """Numbers that share a scale in rows of `columns`: of the powers of two that divide them, the largest that is
        not above `block_size`. None where that is below `SMALLEST_BLOCK`.
        """
        found = min(self.block_size, columns & -columns)
        return found if found >= SMALLEST_BLOCK else None

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of symmetric quantization."""
        return self.levels // 2


@dataclass(frozen=True)
class Quantized:
    """A weight `[N, C]` in blocks of `block`."""

    values: torch.Tensor
    """`[N, C]` uint8, below 2**bits."""
    scale: torch.Tensor
    """`[N, C/block]` float32."""
    zero_point: torch.Tensor
    """`[N, C/block]` uint8."""

    def dequantized(self) -> torch.Tensor:
        """`[N, C]` float32."""
        block = self.values.shape[1] // self.scale.shape[1]
        zero, scale = (t.float().repeat_interleave(block, dim=1) for t in (self.zero_point, self.scale))
        return (self.values.float() - zero) * scale


def quantize(weight: torch.Tensor, scheme: QuantizationScheme) -> Quantized:
    """Quantize a weight `[N, C]`, C a multiple of `SMALLEST_BLOCK` (else ValueError).

    Of a few ranges per block that with the smallest squared error is taken. The symmetric range gives the number of
    largest magnitude the one level more that two's complement has: its sign is the scale's.
    """
    rows, columns = weight.shape
    block = scheme.block(columns)
    if block is None:
        raise ValueError(f"rows of {columns} numbers are no multiple of {SMALLEST_BLOCK}")
    blocks = weight.float().reshape(rows, columns // block, block)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in _SHRINK[scheme.bits]:
        scale, zero = _range(blocks, scheme, shrink)
        values = torch.clamp(torch.round(blocks / scale) + zero, 0, scheme.levels - 1)
        error = ((values - zero) * scale - blocks).square().sum(-1, keepdim=True)
        if best is None:
            best = error, values, scale, zero
        else:
            better = error < best[0]
            found = (error, values, scale, zero)
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    _, values, scale, zero = best
    return Quantized(values.reshape(rows, columns).to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8))


def _range(blocks: torch.Tensor, scheme: QuantizationScheme, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of every block, `[N, blocks, 1]`."""
    tiny = torch.finfo(torch.float32).tiny
    if scheme.symmetric:
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest * (-shrink / scheme.middle)
        scale = torch.where(scale.abs() < tiny, torch.ones_like(scale), scale)
        return scale, torch.full_like(scale, scheme.middle)
    low = blocks.amin(-1, keepdim=True).clamp(max=0) * shrink
    high = blocks.amax(-1, keepdim=True).clamp(min=0) * shrink
    scale = (high - low) / (scheme.levels - 1)
    scale = torch.where(scale < tiny, torch.ones_like(scale), scale)
    return scale, torch.clamp(torch.round(-low / scale), 0, scheme.levels - 1)


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """`[N, n]` numbers below 2**bits as bytes; of two 4-bit numbers the first is in the low half."""
    if bits == 8:
        return values
    flat = values.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return flat[0::2] | (flat[1::2] << 4)
