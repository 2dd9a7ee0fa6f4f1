"""8 bits, floating point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from doge_deploy.graph.weight_formats._base import Part, Quality, add_part, replace_weight, rounded
from doge_deploy.graph.weight_formats._floats import FloatFormat, Stored

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    import torch

    from doge_deploy.graph.weight_formats._base import Array


class Format(FloatFormat):
    """Weights as float8 e4m3 with one scale a tensor; in an engine both sides of a product are float8."""

    name = "fp8"
    title = "8 bits, floating point, for engines"
    rounds_inputs_to = "float8_e4m3fn"
    first_capability = "8.9"
    largest = 448.0
    stored: ClassVar[Stored] = {"values": (".f8", "float8_e4m3fn"), "scale": (".scale", "")}
    quality = Quality(
        0.06,
        1.06,
        0.95,
        "doge-tiny loses 0.018 nats, doge-tiny-moe 0.015, with the inputs of products rounded too. Scales of inputs "
        "that are sixteen times too small lose more than the limit (tests/verify/test_few_bits.py).",
    )

    def parts(self, name: str, shape: tuple[int, int]) -> dict[str, Part]:
        return self.stored_parts(name, {"values": shape, "scale": ()})

    def store(self, weight: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        """Numbers `[N, C]` float8_e4m3fn and a scale `[]` in the dtype of the graph."""
        import torch

        scale = self.tensor_scale(weight, torch.finfo(getattr(torch, self.dtype)).smallest_normal)
        return {"values": (weight.float() / scale.float()).to(torch.float8_e4m3fn), "scale": scale}

    def dequantize(self, parts: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        import numpy as np

        return rounded(parts["values"].astype(np.float32) * np.float32(parts["scale"]), self.dtype)

    def rewrite(self, graph: ir.Graph, weight: ir.Value, name: str, *, transposed: bool) -> None:
        import onnx_ir as ir

        assert weight.shape is not None
        rows, columns = weight.shape.numpy()[::-1] if transposed else weight.shape.numpy()
        parts = [add_part(graph, part) for part in self.parts(name, (rows, columns)).values()]
        node = ir.node("DequantizeLinear", parts, num_outputs=1)
        replace_weight(graph, weight, [node], name, transposed=transposed)
