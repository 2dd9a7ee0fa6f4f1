"""Formats whose numbers are floating themselves, with one more scale for a tensor; in an engine both sides of a product
are rounded to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from doge_deploy.graph.weight_formats._base import Part, PartSource, WeightFormat, power_of_two

if TYPE_CHECKING:
    import torch

HEADROOM = 2.0
"""How many times larger than in the calibration an input of a product may be before it is cut off."""

SMALLEST_INPUT = 2.0**-10
"""An input that was never larger than this in the calibration is treated as if it had been."""


Stored = Mapping[str, tuple[str, str]]
"""Suffix and dtype of the initializers of a weight by what they are; no dtype: that of the graph."""


class FloatFormat(WeightFormat):
    """What such formats have in common.

    Scales of a tensor are powers of two: the numbers are floating, so a finer scale would gain nothing but in the
    smallest of them.
    """

    dtypes = ("fp16", "bf16")
    rounds_activations = True
    targets = frozenset({"ort", "trt", "trt-rtx"})
    largest: ClassVar[float]
    """That a number, and the scale of its block where there is one, can stand for."""
    stored: ClassVar[Stored]

    def kind(self, key: str) -> str:
        """Dtype of a part."""
        return self.stored[key][1] or self.dtype

    def stored_parts(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
        """The initializers of the weight `name`, by what they are; `shapes` has the same keys."""
        return {key: Part(name + suffix, self.kind(key), shapes[key]) for key, (suffix, _) in self.stored.items()}

    def part_of(self, initializer: str, dtype: str) -> PartSource | None:
        for key, (suffix, _) in self.stored.items():
            if initializer.endswith(suffix):
                return PartSource(initializer.removesuffix(suffix), key, self.kind(key))
        return None

    def tensor_scale(self, weight: torch.Tensor, smallest: float) -> torch.Tensor:
        """The scale of a whole weight, `[]` in the dtype of the graph; 1 for zeros, else at least `smallest`."""
        import torch

        largest = float(weight.abs().max())
        scale = power_of_two(largest / self.largest) if largest else 1.0
        return torch.tensor(scale, dtype=getattr(torch, self.dtype)).clamp(min=smallest)

    def input_scale(self, name: str) -> float | None:
        largest = self.ranges.get(name)
        return None if largest is None else power_of_two(max(largest, SMALLEST_INPUT) * HEADROOM / self.largest)
