"""4 bits, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from doge_deploy.errors import UsageError
from doge_deploy.graph.weight_formats._base import Part, PartSource, Quality
from doge_deploy.graph.weight_formats._blocks import SCALE_SUFFIX, BlockFormat
from doge_deploy.graph.weight_formats._feedback import scales_with_feedback
from doge_deploy.graph.weight_formats._scales import positive_scales

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from doge_deploy.graph.weight_formats._base import Array

VALUES_SUFFIX = ".i4"


class Format(BlockFormat):
    """Weights in 4 bits. With so few levels it pays to clip the outermost number of a block.

    A graph in half precision has whole numbers from -8 to 7, a positive scale of its dtype and no zero point: the one
    form that TensorRT multiplies with as it is stored. Number times scale is exact in that dtype, so that every runtime
    has the same weights. Positive scales lose more, since the largest number of a block may have the sign without a
    level more; so numbers are chosen by the inputs that a text gives the weights, where there is a text.
    """

    name = "int4"
    title = "4 bits, block by block"
    bits = 4
    dtypes = ("fp32", "fp16", "bf16")
    shrink = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
    default_block_size = 32
    targets = frozenset({"ort", "trt", "trt-rtx"})
    quality = Quality(
        0.3,
        1.3,
        0.85,
        "doge-tiny loses 0.08 to 0.14 nats at block sizes 16 to 64. Halves of bytes exchanged lose more than 1 nat "
        "(tests/verify/test_quality.py).",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.signed and not self.symmetric:
            raise UsageError(
                f"symmetric=False with dtype={options['dtype']}: zero points are for graphs that compute in fp32; "
                "leave symmetric at true"
            )

    @property
    def signed(self) -> bool:
        """Whether numbers are stored from -8 to 7."""
        return self.dtype != "float32"

    @property
    def uses_covariances(self) -> bool:
        return self.signed

    def target_refusal(self, target: str) -> str:
        refusal = super().target_refusal(target)
        if not refusal and target.startswith("trt") and not self.signed:
            return f"stores its weights as int4 of an fp32 graph, which {target} does not take"
        return refusal

    def target_remedy(self, target: str) -> str:
        return super().target_remedy(target) if target not in self.targets else "export with --dtype fp16 or bf16"

    def parts(self, name: str, shape: tuple[int, int]) -> dict[str, Part]:
        if not self.signed:
            return super().parts(name, shape)
        rows, columns = shape
        return {
            "values": Part(name + VALUES_SUFFIX, "int4", shape),
            "scale": Part(name + SCALE_SUFFIX, self.dtype, (rows, columns // self._known_block(columns))),
        }

    def part_of(self, initializer: str, dtype: str) -> PartSource | None:
        if not self.signed:
            return super().part_of(initializer, dtype)
        for key, suffix, part_dtype in (("values", VALUES_SUFFIX, "int4"), ("scale", SCALE_SUFFIX, self.dtype)):
            if initializer.endswith(suffix):
                return PartSource(initializer.removesuffix(suffix), key, part_dtype)
        return None

    def constant(self, initializer: str) -> torch.Tensor:
        if self.signed:
            raise ValueError(f"{initializer!r} is no constant of weights stored as int4")
        return super().constant(initializer)

    def store(self, weight: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        """Numbers `[N, C]` int8 and scales `[N, C/block]` in the dtype of the graph; see `BlockFormat.store` for those
        with zero points.

        Raises:
            ValueError: C is no multiple of `SMALLEST_BLOCK`.
        """
        import torch

        if not self.signed:
            return super().store(weight, name)
        rows, columns = weight.shape
        block = self._known_block(columns)
        values, scale = positive_scales(weight.float().reshape(rows, columns // block, block), self.dtype)
        return {"values": values.reshape(rows, columns).to(torch.int8), "scale": scale}

    def store_by(self, weight: torch.Tensor, covariance: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        import torch

        if not self.uses_covariances:
            return super().store_by(weight, covariance, name)
        block = self._known_block(weight.shape[1])
        values, scale = scales_with_feedback(weight.float(), covariance, block, self.dtype)
        return {"values": values.to(torch.int8), "scale": scale}

    def dequantize(self, parts: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        import numpy as np

        if not self.signed:
            return super().dequantize(parts)
        values, scale = parts["values"].astype(np.float32), parts["scale"].astype(np.float32)
        return values * scale.repeat(values.shape[1] // scale.shape[1], axis=1)
