"""Quantized weights in ONNX Runtime's own operators, which read them as they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from doge_deploy.targets.ort.matching import CONTRIB, Emitter, attribute, require_contrib, stored_again, take_place

ACCURACY_LEVEL = 4
"""MatMulNBits may round the state to 8 bits, block by block, and multiply whole numbers.

On a processor with VNNI a row of 8-bit weights takes 12 us so and 900 us in float32 (512 x 2048), one of 4-bit weights
half the time; what that costs in accuracy is judged by `verify` with the rest of the quantization.
"""


class QuantizedWeightsPass(ir.passes.InPlacePass):
    """DequantizeLinear + Transpose + MatMul -> MatMulNBits; DequantizeLinear + Gather -> GatherBlockQuantized.

    The operators see the stored bytes in other shapes; a tied embedding stays one tensor for both.

    Needs: 4 or 8 bits, unsigned, blocked along the rows of a 2-D weight in external data; whole blocks;
    where the operators need zero points, a whole number of bytes of them per row.
    Promises: the same weights. The state is rounded to 8 bits per block for a product, see `ACCURACY_LEVEL`; not at
    level 0.

    1. A zero point that is the middle of the range everywhere is left out: it is what the operators assume.
    2. A reader of another kind keeps the DequantizeLinear.
    """

    def __init__(self, accuracy_level: int = ACCURACY_LEVEL) -> None:
        super().__init__()
        self._accuracy_level = accuracy_level

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        weights = [weight for node in model.graph if (weight := match_quantized(node)) is not None]
        for weight in weights:
            views = views_of(model.graph, weight)
            for use in list(weight.output.uses()):
                if use.node.op_type == "Transpose" and attribute(use.node, "perm") == (1, 0):
                    for product in [u.node for u in use.node.outputs[0].uses() if u.node.op_type == "MatMul"]:
                        _multiply(product, weight, views, self._accuracy_level)
                elif use.node.op_type == "Gather" and use.idx == 0 and attribute(use.node, "axis", 0) == 0:
                    _gather(use.node, weight, views)
        if weights:
            require_contrib(model)
        return ir.passes.PassResult(model, bool(weights))


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[N, C]` in external data."""

    output: ir.Value
    """The dequantized `[N, C]`."""
    values: ir.ExternalTensor
    scale: ir.Value
    zero_point: ir.ExternalTensor
    bits: int
    block: int
    rows: int
    columns: int

    @property
    def has_middle_zero(self) -> bool:
        """The zero point is the middle of the range everywhere: what the operators assume where they get none."""
        return not np.any(self.zero_point.numpy() != 1 << (self.bits - 1))


@dataclass(frozen=True)
class Views:
    """The same bytes for other operators."""

    blocks: ir.Value
    """`[N, C/block, block*bits/8]` uint8."""
    rows: ir.Value
    """`[N, C*bits/8]` uint8."""
    zero_point: ir.Value | None
    """`[N, C/block*bits/8]` uint8; None where it is the middle of the range."""


def match_quantized(node: ir.Node) -> QuantizedWeight | None:
    """The weight that a DequantizeLinear unpacks, where ONNX Runtime's operators can read it; else None."""
    if node.op_type != "DequantizeLinear" or attribute(node, "axis", 1) != 1 or len(node.inputs) != 3:
        return None
    values, scale, zero = node.inputs
    if any(v is None or not isinstance(v.const_value, ir.ExternalTensor) for v in node.inputs):
        return None
    assert values is not None and scale is not None and zero is not None
    stored, zeros = values.const_value, zero.const_value
    assert isinstance(stored, ir.ExternalTensor) and isinstance(zeros, ir.ExternalTensor)
    bits = {ir.DataType.UINT4: 4, ir.DataType.UINT8: 8}.get(stored.dtype)
    block = attribute(node, "block_size", 0)
    shape = stored.shape.numpy()
    if bits is None or block < 16 or len(shape) != 2 or shape[1] % block:
        return None
    weight = QuantizedWeight(node.outputs[0], stored, scale, zeros, bits, block, *shape)
    # A row of zero points begins with a byte of its own in the operators, and where the last row ends in storage.
    whole_bytes = shape[1] // block * bits % 8 == 0
    return weight if whole_bytes or weight.has_middle_zero else None


def views_of(graph: ir.Graph, weight: QuantizedWeight) -> Views:
    """Initializers of `graph` on the bytes of `weight`, in the shapes that the operators take."""
    blocks, row_bytes = weight.columns // weight.block, weight.columns * weight.bits // 8

    def view(tensor: ir.ExternalTensor, what: str, *shape: int) -> ir.Value:
        return stored_again(graph, tensor, f"{tensor.name}.{what}", dtype=ir.DataType.UINT8, shape=shape)

    by_block = view(weight.values, "blocks", weight.rows, blocks, weight.block * weight.bits // 8)
    by_row = view(weight.values, "rows", weight.rows, row_bytes)
    zero = None
    if not weight.has_middle_zero:
        zero = view(weight.zero_point, "bytes", weight.rows, blocks * weight.bits // 8)
    return Views(by_block, by_row, zero)


def _multiply(product: ir.Node, weight: QuantizedWeight, views: Views, accuracy_level: int) -> None:
    emit = Emitter(product, product.outputs[0].name or "product")
    inputs = [product.inputs[0], views.blocks, weight.scale, *([views.zero_point] if views.zero_point else [])]
    node = emit(
        "MatMulNBits",
        *inputs,
        domain=CONTRIB,
        K=weight.columns,
        N=weight.rows,
        bits=weight.bits,
        block_size=weight.block,
        accuracy_level=accuracy_level,
    )
    take_place(product.outputs[0], node.outputs[0])


def _gather(gather: ir.Node, weight: QuantizedWeight, views: Views) -> None:
    emit = Emitter(gather, gather.outputs[0].name or "rows")
    inputs = [views.rows, gather.inputs[1], weight.scale, *([views.zero_point] if views.zero_point else [])]
    node = emit(
        "GatherBlockQuantized",
        *inputs,
        domain=CONTRIB,
        bits=weight.bits,
        block_size=weight.block,
        gather_axis=0,
        quantize_axis=1,
    )
    take_place(gather.outputs[0], node.outputs[0])
