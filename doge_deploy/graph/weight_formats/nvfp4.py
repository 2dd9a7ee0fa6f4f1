"""4 bits, floating point, with scales of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from doge_deploy.graph.weight_formats import int4
from doge_deploy.graph.weight_formats._base import Part, PartSource, Quality, add_part, replace_weight, rounded
from doge_deploy.graph.weight_formats._floats import FloatFormat, Stored

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    import torch

    from doge_deploy.graph.weight_formats._base import Array

BLOCK = 16
"""Numbers that share a scale; the hardware knows no other."""

LARGEST, LARGEST_SCALE, SMALLEST_SCALE = 6.0, 448.0, 2.0**-9
"""Of float4 e2m1, and of the scales, float8 e4m3."""

SMALLEST_WHOLE_SCALE = 2.0**-24
"""Of a tensor: the smallest positive number of float16."""

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers in this format."""


class Format(FloatFormat):
    """Weights of the layers' products as float4 e2m1: a float8 scale per block of 16, and one more for the tensor.

    In an engine the other side of a product is rounded to the same format block by block in every call. Embedding, head
    and expert tables are stored as `int4`: they are looked up by row, or multiplied with one token.
    """

    name = "nvfp4"
    title = "4 bits, floating point, for engines (experimental)"
    rounds_inputs_to = "float4_e2m1fn"
    first_capability = "12.0"
    largest = LARGEST * LARGEST_SCALE
    stored: ClassVar[Stored] = {
        "values": (".f4", "float4_e2m1fn"),
        "block_scale": (".block_scale", "float8_e4m3fn"),
        "whole_scale": (".whole_scale", ""),
    }
    quality = Quality(
        0.5,
        1.4,
        0.8,
        "experimental: no device has judged it, the rounding of inputs is emulated. doge-tiny loses 0.17 nats, "
        "doge-tiny-moe 0.11. Halves of bytes exchanged lose more than 1 nat (tests/verify/test_few_bits.py).",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rest = int4.Format(dtype=options.get("dtype", "fp16"))
        """How everything else is stored."""

    def _is_product(self, name: str) -> bool:
        return any(f".{part}." in name for part in PRODUCTS)

    def refusal(self, name: str, shape: Sequence[int]) -> str:
        reason = super().refusal(name, shape)
        if reason or not self._is_product(name):
            return reason or self.rest.refusal(name, shape)
        return f"its rows of {shape[1]} numbers are no multiple of {BLOCK}" if shape[1] % BLOCK else ""

    def parts(self, name: str, shape: tuple[int, int]) -> dict[str, Part]:
        if not self._is_product(name):
            return self.rest.parts(name, shape)
        blocks = (shape[0], shape[1] // BLOCK)
        return self.stored_parts(name, {"values": shape, "block_scale": blocks, "whole_scale": ()})

    def part_of(self, initializer: str, dtype: str) -> PartSource | None:
        return super().part_of(initializer, dtype) or self.rest.part_of(initializer, dtype)

    def store(self, weight: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        """Codes `[N, C]` uint8 of float4 e2m1, scales `[N, C/16]` float8_e4m3fn and a scale `[]` in the dtype of the
        graph; see `int4` for what is no product of a layer.
        """
        import ml_dtypes
        import numpy as np
        import torch

        if not self._is_product(name):
            return self.rest.store(weight, name)
        rows, columns = weight.shape
        blocks = weight.float().reshape(rows, columns // BLOCK, BLOCK)
        whole = self.tensor_scale(weight, SMALLEST_WHOLE_SCALE)
        scale = (blocks.abs().amax(-1) / LARGEST / whole.float()).clamp(min=SMALLEST_SCALE).to(torch.float8_e4m3fn)
        scaled = blocks / (scale.float() * whole.float())[..., None]
        codes = scaled.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        return {
            "values": torch.from_numpy(codes.reshape(rows, columns)),
            "block_scale": scale,
            "whole_scale": whole,
        }

    def dequantize(self, parts: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        import ml_dtypes
        import numpy as np

        if "whole_scale" not in parts:
            return self.rest.dequantize(parts)
        values = parts["values"].view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        scale = rounded(parts["block_scale"].astype(np.float32) * np.float32(parts["whole_scale"]), self.dtype)
        return rounded(values * scale.repeat(BLOCK, axis=1), self.dtype)

    def input_scale(self, name: str) -> float | None:
        return super().input_scale(name) if self._is_product(name) else None

    def rewrite(self, graph: ir.Graph, weight: ir.Value, name: str, *, transposed: bool) -> None:
        import onnx_ir as ir

        if not self._is_product(name):
            self.rest.rewrite(graph, weight, name, transposed=transposed)
            return
        assert weight.shape is not None
        rows, columns = weight.shape.numpy()[::-1] if transposed else weight.shape.numpy()
        parts = {key: add_part(graph, part) for key, part in self.parts(name, (rows, columns)).items()}
        scale = ir.node("DequantizeLinear", [parts["block_scale"], parts["whole_scale"]], num_outputs=1)
        scale.outputs[0].name = f"{name}.dequantized_scale"
        scale.outputs[0].shape, scale.outputs[0].type = parts["block_scale"].shape, weight.type
        attributes = {"axis": 1, "block_size": BLOCK}
        node = ir.node("DequantizeLinear", [parts["values"], scale.outputs[0]], attributes, num_outputs=1)
        replace_weight(graph, weight, [scale, node], name, transposed=transposed)
