"""8 bits, floating point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from doge_deploy.graph.weight_formats._base import (
    Part,
    PartSource,
    Quality,
    WeightFormat,
    add_part,
    power_of_two,
    replace_weight,
    rounded,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    import torch

    from doge_deploy.graph.weight_formats._base import Array

VALUES_SUFFIX, SCALE_SUFFIX = ".f8", ".scale"

LARGEST = 448.0
"""Of float8 e4m3."""

HEADROOM = 2.0
"""How many times larger than in the calibration an input of a product may be before it is cut off."""


class Format(WeightFormat):
    """Weights as float8 e4m3 with one scale a tensor; in an engine both sides of a product are float8.

    Scales are powers of two: the numbers are floating, so a finer scale would gain nothing but in the smallest of them.
    """

    name = "fp8"
    title = "8 bits, floating point, for engines"
    dtypes = ("fp16", "bf16")
    rounds_activations = True
    rounds_inputs_to = "float8_e4m3fn"
    first_capability = "8.9"
    targets = frozenset({"ort", "trt", "trt-rtx"})
    quality = Quality(
        0.06,
        1.06,
        0.95,
        "doge-tiny loses 0.018 nats, doge-tiny-moe 0.015, with the inputs of products rounded too. Scales of inputs "
        "that are sixteen times too small lose more than the limit (tests/verify/test_few_bits.py).",
    )

    def parts(self, name: str, shape: tuple[int, int]) -> dict[str, Part]:
        return {
            "values": Part(name + VALUES_SUFFIX, "float8_e4m3fn", shape),
            "scale": Part(name + SCALE_SUFFIX, self.dtype, ()),
        }

    def part_of(self, initializer: str, dtype: str) -> PartSource | None:
        for key, suffix, kind in (("values", VALUES_SUFFIX, "float8_e4m3fn"), ("scale", SCALE_SUFFIX, self.dtype)):
            if initializer.endswith(suffix):
                return PartSource(initializer.removesuffix(suffix), key, kind)
        return None

    def store(self, weight: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        """Numbers `[N, C]` float8_e4m3fn and a scale `[]` in the dtype of the graph."""
        import torch

        largest = float(weight.abs().max())
        scale = torch.tensor(power_of_two(largest / LARGEST) if largest else 1.0, dtype=getattr(torch, self.dtype))
        scale = scale.clamp(min=torch.finfo(scale.dtype).smallest_normal)
        return {"values": (weight.float() / scale.float()).to(torch.float8_e4m3fn), "scale": scale}

    def dequantize(self, parts: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        import numpy as np

        return rounded(parts["values"].astype(np.float32) * np.float32(parts["scale"]), self.dtype)

    def input_scale(self, name: str) -> float | None:
        largest = self.ranges.get(name)
        return None if largest is None else power_of_two(max(largest, 2.0**-10) * HEADROOM / LARGEST)

    def rewrite(self, graph: ir.Graph, weight: ir.Value, name: str, *, transposed: bool) -> None:
        import onnx_ir as ir

        assert weight.shape is not None
        rows, columns = weight.shape.numpy()[::-1] if transposed else weight.shape.numpy()
        parts = [add_part(graph, part) for part in self.parts(name, (rows, columns)).values()]
        node = ir.node("DequantizeLinear", parts, num_outputs=1)
        replace_weight(graph, weight, [node], name, transposed=transposed)
