"""Weights in few bits, in standard operators."""

from __future__ import annotations

import onnx_ir as ir
import torch

from doge_deploy.checkpoint import Checkpoint
from doge_deploy.graph.passes.pending import pending
from doge_deploy.graph.passes.transpose_weights import TRANSPOSED_SUFFIX
from doge_deploy.graph.quantize import SMALLEST_BLOCK, QuantizationScheme, Quantized, packed, quantize
from doge_deploy.graph.schemas import CDMOE
from doge_deploy.options.export import ExportOptions
from doge_deploy.options.resolved import ResolvedOptions

SCALE_SUFFIX, ZERO_SUFFIX = ".scale", ".zero_point"
SHARED_ZERO = "zero_point"
"""Beginning of the name of a symmetric zero point, which weights of one shape share."""

KEPT = {
    "dt_proj": "it decides which keys are kept, through an exponential",
    "router_gate": "it decides which experts are taken",
}
"""Linear layers that keep their dtype, with the reason. They are small."""


KNOWN_READERS = {"MatMul", "Gather", "Transpose", CDMOE}
"""Operators that may read a weight which is not stored in float32."""


def values_suffix(bits: int) -> str:
    """Added to a checkpoint tensor's name where the graph holds its quantized numbers: `.q4`, `.q8`."""
    return f".q{bits}"


class QuantizeWeightsPass(ir.passes.InPlacePass):
    """Initializers of linear layers, embedding, head and expert tables become `DequantizeLinear` of few bits.

    Needs: initializers named as in the checkpoint (with the transpose suffix where TransposeWeightsPass ran), data not
    yet attached.
    Promises: every reader gets the dequantized weight; a tied embedding is stored once.

    1. Fires on 2-D weights whose rows are a multiple of the smallest block.
    2. Must not fire on the layers in `KEPT`, nor on weights with another reader than those known here.
    """

    def __init__(self, scheme: QuantizationScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.left: dict[str, str] = {}
        """2-D checkpoint tensors that were left as they are -> why."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for weight in list(model.graph.initializers.values()):
            if weight.shape is None or len(weight.shape) != 2 or weight.name is None or weight.name.startswith("rope_"):
                continue
            name = weight.name.removesuffix(TRANSPOSED_SUFFIX)
            transposed = name != weight.name
            columns = int(weight.shape[0 if transposed else 1])  # type: ignore[arg-type]
            reason = self._reason(name, columns, weight)
            if reason:
                self.left[name] = reason
            else:
                self._quantize(model.graph, weight, name, transposed)
        return ir.passes.PassResult(model, True)

    def _reason(self, name: str, columns: int, weight: ir.Value) -> str:
        """Why a weight must stay as it is; "" where it can be quantized."""
        for part, why in KEPT.items():
            if f".{part}." in name:
                return why
        if self.scheme.block(columns) is None:
            return f"its rows of {columns} numbers are no multiple of {SMALLEST_BLOCK}"
        readers = {use.node.op_type for use in weight.uses()}
        known = readers <= KNOWN_READERS
        return "" if known else f"it is read by {', '.join(sorted(readers))}"

    def _quantize(self, graph: ir.Graph, weight: ir.Value, name: str, transposed: bool) -> None:
        scheme = self.scheme
        assert weight.shape is not None
        shape = tuple(int(n) for n in weight.shape)  # type: ignore[arg-type]
        rows, columns = shape[::-1] if transposed else shape
        block = scheme.block(columns)
        assert block is not None
        blocks = columns // block
        dtype = ir.DataType.UINT4 if scheme.bits == 4 else ir.DataType.UINT8
        zero_name = f"{SHARED_ZERO}.{rows}x{blocks}" if scheme.symmetric else name + ZERO_SUFFIX
        values = self._add(graph, name + values_suffix(scheme.bits), dtype, (rows, columns))
        scale = self._add(graph, name + SCALE_SUFFIX, ir.DataType.FLOAT, (rows, blocks))
        zero = self._add(graph, zero_name, dtype, (rows, blocks))
        attributes = {"axis": 1, "block_size": block}
        node = ir.node("DequantizeLinear", [values, scale, zero], attributes, num_outputs=1)
        nodes, result = [node], node.outputs[0]
        result.name, result.shape, result.type = f"{name}.dequantized", ir.Shape((rows, columns)), weight.type
        if transposed:
            nodes.append(ir.node("Transpose", [result], {"perm": [1, 0]}))
            result = nodes[1].outputs[0]
            result.name, result.shape, result.type = weight.name, weight.shape, weight.type
        graph.insert_before(graph[0], nodes)
        weight.replace_all_uses_with(result)
        assert weight.name is not None
        del graph.initializers[weight.name]

    def _add(self, graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        if name in graph.initializers:
            return graph.initializers[name]
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        value.const_value = pending(dtype, ir.Shape(shape), name)
        graph.register_initializer(value)
        return value


def scheme_of(options: ExportOptions | ResolvedOptions) -> QuantizationScheme | None:
    """How weights are put into blocks of few bits under these options; None where they are not.

    `block_size` must be resolved: a number where weights are stored in blocks.
    """
    bits = {None: None, "fp16": None, "int8": 8, "int4": 4}[options.quantize]
    if bits is None:
        return None
    assert options.block_size is not None
    return QuantizationScheme(bits, options.block_size, options.symmetric)


def part_of(name: str, scheme: QuantizationScheme) -> tuple[str, str] | None:
    """The checkpoint tensor ("" for a shared zero point) and the part of it that an initializer of this name is."""
    if name.startswith(SHARED_ZERO + "."):
        return "", "zero"
    for suffix, part in ((values_suffix(scheme.bits), "values"), (SCALE_SUFFIX, "scale"), (ZERO_SUFFIX, "zero")):
        if name.endswith(suffix):
            return name.removesuffix(suffix), part
    return None


class QuantizedParts:
    """The numbers of initializers that `part_of` knows, made from a checkpoint.

    The parts of one weight are made together, so ask for them one after another.
    """

    def __init__(self, checkpoint: Checkpoint, scheme: QuantizationScheme) -> None:
        self.checkpoint = checkpoint
        self.scheme = scheme
        self._latest: tuple[str, Quantized] | None = None

    def data(self, name: str) -> torch.Tensor:
        """The numbers of the initializer `name`, those of 4 bits packed into bytes."""
        found = part_of(name, self.scheme)
        if found is None:
            raise ValueError(f"{name!r} is no part of a quantized weight")
        source, part = found
        if not source:
            rows, blocks = map(int, name.rsplit(".", 1)[1].split("x"))
            return packed(torch.full((rows, blocks), self.scheme.middle, dtype=torch.uint8), self.scheme.bits)
        if self._latest is None or self._latest[0] != source:
            self._latest = source, quantize(self.checkpoint.read(source), self.scheme)
        made = self._latest[1]
        if part == "scale":
            return made.scale
        return packed(made.values if part == "values" else made.zero_point, self.scheme.bits)
