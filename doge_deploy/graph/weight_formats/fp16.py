"""Half precision, computed with in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from doge_deploy.graph.weight_file import TRANSPOSED_SUFFIX
from doge_deploy.graph.weight_formats._base import Part, PartSource, Quality, WeightFormat

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    import torch

    from doge_deploy.graph.weight_formats._base import Array


class Format(WeightFormat):
    """Weights as float16, each followed by a `Cast`; they keep name and orientation of the initializer.

    Of an embedding or a table of experts only the rows that are looked up are cast. No tensor is stored twice.
    """

    name = "fp16"
    title = "half precision"
    quality = Quality(
        0.002,
        1.01,
        0.99,
        "doge-tiny loses 0.0001 nats, doge-tiny-moe 0.0005: rounding moves logits little, but may exchange two keys "
        "at the edge of the window or two experts. A projection 10 % too large loses more than the limit "
        "(tests/verify/test_quality.py).",
    )

    @property
    def range_dtype(self) -> str:
        return "float16"

    def parts(self, name: str, shape: tuple[int, int]) -> dict[str, Part]:
        return {"values": Part(name, "float16", shape)}

    def part_of(self, initializer: str, dtype: str) -> PartSource | None:
        if dtype != "float16":
            return None
        name = initializer.removesuffix(TRANSPOSED_SUFFIX)
        return PartSource(name, "values" if name == initializer else "transposed", "float16")

    def store(self, weight: torch.Tensor, name: str = "") -> dict[str, torch.Tensor]:
        values = weight.half()
        return {"values": values, "transposed": values.T}

    def dequantize(self, parts: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        import numpy as np

        return parts["values"].astype(np.float32)

    def loaded_bytes(self, name: str, shape: tuple[int, int], *, gathered: bool) -> int:
        """A runtime widens what it multiplies with, once, when it loads it."""
        return self.stored_bytes(name, shape) if gathered else 2 * self.stored_bytes(name, shape)

    def rewrite(self, graph: ir.Graph, weight: ir.Value, name: str, *, transposed: bool) -> None:
        import onnx_ir as ir

        from doge_deploy.graph.passes.pending import pending

        wide, shape = weight.type, weight.shape
        assert shape is not None
        whole: ir.Value | None = None
        for use in list(weight.uses()):
            if use.node.op_type == "Gather" and use.idx == 0:
                _cast_rows(graph, use.node, wide)
                continue
            if whole is None:
                node = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, num_outputs=1)
                graph.insert_before(graph[0], node)
                whole = node.outputs[0]
                whole.name, whole.shape, whole.type = f"{weight.name}.float", weight.shape, wide
            use.node.replace_input_with(use.idx, whole)
        weight.type = ir.TensorType(ir.DataType.FLOAT16)
        weight.const_value = pending(ir.DataType.FLOAT16, shape, weight.name)


def _cast_rows(graph: ir.Graph, gather: ir.Node, wide: ir.TypeProtocol | None) -> None:
    import onnx_ir as ir

    rows = gather.outputs[0]
    node = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT}, num_outputs=1)
    result = node.outputs[0]
    result.shape, result.type = rows.shape, wide
    rows.replace_all_uses_with(result)
    node.replace_input_with(0, rows)
    result.name, rows.name = rows.name, f"{rows.name}.half"
    rows.type = ir.TensorType(ir.DataType.FLOAT16)
    graph.insert_after(gather, node)
