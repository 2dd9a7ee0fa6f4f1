"""Block-wise weight-only quantization: numbers of `bits` bits with a scale, and a zero point, per block of a row.

    weight[n, c] ~ (q[n, c] - zero_point[n, c // block]) * scale[n, c // block],   0 <= q < 2**bits

Reference: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html (blocked quantization).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from doge_deploy.graph.weight_formats._base import Part, PartSource, WeightFormat, add_part, replace_weight

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    import torch

    from doge_deploy.graph.weight_formats._base import Array

SMALLEST_BLOCK = 16
"""Numbers of a block that ONNX Runtime's operators take, at least."""

SCALE_SUFFIX, ZERO_SUFFIX = ".scale", ".zero_point"
SHARED_ZERO = "zero_point"
"""Beginning of the name of a symmetric zero point, which weights of one shape share."""


class BlockFormat(WeightFormat):
    """Numbers of 4 or 8 bits; subclasses say how many.

    Of a row all blocks have one size: of the powers of two that divide the row the largest that is not above
    `block_size`.
    """

    bits: ClassVar[int]
    """4 or 8."""
    shrink: ClassVar[tuple[float, ...]] = (1.0,)
    """Fractions of a block's range that are tried."""
    block_sizes = (16, 32, 64, 128, 256)
    rounds_activations = True

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of symmetric quantization."""
        return self.levels // 2

    def block(self, columns: int) -> int | None:
        """Numbers that share a scale in rows of `columns`; None where that is below `SMALLEST_BLOCK`."""
        assert self.block_size is not None
        found = min(self.block_size, columns & -columns)
        return found if found >= SMALLEST_BLOCK else None

    def refusal(self, name: str, shape: Sequence[int]) -> str:
        reason = super().refusal(name, shape)
        if not reason and self.block(shape[1]) is None:
            return f"its rows of {shape[1]} numbers are no multiple of {SMALLEST_BLOCK}"
        return reason

    @property
    def _values_suffix(self) -> str:
        return f".q{self.bits}"

    def parts(self, name: str, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        blocks = columns // self._known_block(columns)
        dtype = f"uint{self.bits}"
        zero = f"{SHARED_ZERO}.{rows}x{blocks}" if self.symmetric else name + ZERO_SUFFIX
        return {
            "values": Part(name + self._values_suffix, dtype, (rows, columns)),
            "scale": Part(name + SCALE_SUFFIX, "float32", (rows, blocks)),
            "zero_point": Part(zero, dtype, (rows, blocks), constant=self.symmetric),
        }

    def part_of(self, initializer: str, dtype: str) -> PartSource | None:
        numbers = f"uint{self.bits}"
        if initializer.startswith(SHARED_ZERO + "."):
            return PartSource("", initializer, numbers)
        for key, suffix, part_dtype in (
            ("values", self._values_suffix, numbers),
            ("scale", SCALE_SUFFIX, "float32"),
            ("zero_point", ZERO_SUFFIX, numbers),
        ):
            if initializer.endswith(suffix):
                return PartSource(initializer.removesuffix(suffix), key, part_dtype)
        return None

    def constant(self, initializer: str) -> torch.Tensor:
        import torch

        if not initializer.startswith(SHARED_ZERO + "."):
            return super().constant(initializer)
        rows, blocks = map(int, initializer.rsplit(".", 1)[1].split("x"))
        return torch.full((rows, blocks), self.middle, dtype=torch.uint8)

    def store(self, weight: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        """Numbers `[N, C]` uint8, scales `[N, C/block]` float32 and, where not symmetric, zero points of that shape.

        Of a few ranges per block that with the smallest squared error is taken.

        Raises:
            ValueError: C is no multiple of `SMALLEST_BLOCK`.
        """
        import torch

        rows, columns = weight.shape
        block = self._known_block(columns)
        blocks = weight.float().reshape(rows, columns // block, block)
        best: tuple[torch.Tensor, ...] | None = None
        for shrink in self.shrink:
            scale, zero = self._range(blocks, shrink)
            values = torch.clamp(torch.round(blocks / scale) + zero, 0, self.levels - 1)
            error = ((values - zero) * scale - blocks).square().sum(-1, keepdim=True)
            if best is None:
                best = error, values, scale, zero
            else:
                better = error < best[0]
                found = (error, values, scale, zero)
                best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        assert best is not None
        _, values, scale, zero = best
        stored = {"values": values.reshape(rows, columns).to(torch.uint8), "scale": scale.squeeze(-1)}
        if not self.symmetric:
            stored["zero_point"] = zero.squeeze(-1).to(torch.uint8)
        return stored

    def _range(self, blocks: torch.Tensor, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of every block, `[N, blocks, 1]`.

        The symmetric range gives the number of largest magnitude the one level more that two's complement has: its
        sign is the scale's.
        """
        import torch

        tiny = torch.finfo(torch.float32).tiny
        if self.symmetric:
            largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
            scale = largest * (-shrink / self.middle)
            scale = torch.where(scale.abs() < tiny, torch.ones_like(scale), scale)
            return scale, torch.full_like(scale, self.middle)
        low = blocks.amin(-1, keepdim=True).clamp(max=0) * shrink
        high = blocks.amax(-1, keepdim=True).clamp(min=0) * shrink
        scale = (high - low) / (self.levels - 1)
        scale = torch.where(scale < tiny, torch.ones_like(scale), scale)
        return scale, torch.clamp(torch.round(-low / scale), 0, self.levels - 1)

    def dequantize(self, parts: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        import numpy as np

        values, scale = parts["values"], parts["scale"]
        zero = parts.get("zero_point", np.full(scale.shape, self.middle, np.uint8))
        block = values.shape[1] // scale.shape[1]
        zero, scale = (part.astype(np.float32).repeat(block, axis=1) for part in (zero, scale))
        return (values.astype(np.float32) - zero) * scale

    def rewrite(self, graph: ir.Graph, weight: ir.Value, name: str, *, transposed: bool) -> None:
        import onnx_ir as ir

        assert weight.shape is not None
        rows, columns = weight.shape.numpy()[::-1] if transposed else weight.shape.numpy()
        parts = [add_part(graph, part) for part in self.parts(name, (rows, columns)).values()]
        attributes = {"axis": 1, "block_size": self._known_block(columns)}
        node = ir.node("DequantizeLinear", parts, attributes, num_outputs=1)
        replace_weight(graph, weight, [node], name, transposed=transposed)

    def _known_block(self, columns: int) -> int:
        block = self.block(columns)
        if block is None:
            raise ValueError(f"rows of {columns} numbers are no multiple of {SMALLEST_BLOCK}")
        return block
