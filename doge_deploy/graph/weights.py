"""The weight file: one safetensors file that every graph of a bundle refers to as ONNX external data.

A tensor is written once, whichever graphs use it, and read from the checkpoint one at a time: peak memory is the
largest tensor, not the model.
Reference: https://github.com/huggingface/safetensors (format); onnx.proto `TensorProto.external_data`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from doge_deploy.checkpoint import Checkpoint
from doge_deploy.dtypes import BY_ONNX
from doge_deploy.graph.passes.half_weights import HalfWeightsPass
from doge_deploy.graph.passes.quantize_weights import QuantizedParts, QuantizeWeightsPass, part_of, scheme_of
from doge_deploy.graph.passes.transpose_weights import TRANSPOSED_SUFFIX
from doge_deploy.options.export import ExportOptions

WEIGHTS_FILE = "weights.safetensors"

_ALIGNMENT = 4096
"""Data starts on a page, so that runtimes can map the file."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the weight file: where it lies and how to make it."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class TensorSources:
    """Where the numbers of a graph's initializers come from: the checkpoint, the RoPE tables, and quantization.

    Args:
        checkpoint: where weights are read from; they are cast to the initializer's dtype.
        rope: see `doge_deploy.model.rope.rope_tensors`.
        options: export options, for whether and how weights are quantized.
    """

    def __init__(self, checkpoint: Checkpoint, rope: Mapping[str, torch.Tensor], options: ExportOptions) -> None:
        self.checkpoint = checkpoint
        self.rope = rope
        self.scheme = scheme_of(options)
        self._half = options.quantize == "fp16"
        self._parts = None if self.scheme is None else QuantizedParts(checkpoint, self.scheme)
        self.left: dict[str, str] = {}
        """Tensors that were not quantized though that was asked for -> why."""

    def quantize(self, model: ir.Model) -> None:
        """Quantize the weights of a traced graph, in place, where that was asked for."""
        step: QuantizeWeightsPass | HalfWeightsPass
        if self.scheme is not None:
            step = QuantizeWeightsPass(self.scheme)
        elif self._half:
            step = HalfWeightsPass()
        else:
            return
        step(model)
        self.left |= step.left

    def initializers(self, model: ir.Model) -> dict[str, ir.Value]:
        """The initializers of `model` that this is the source of."""
        known = {*self.checkpoint.tensors, *self.rope}
        return {
            name: value
            for name, value in model.graph.initializers.items()
            if name.removesuffix(TRANSPOSED_SUFFIX) in known or self._is_part(name)
        }

    def _is_part(self, name: str) -> bool:
        return self.scheme is not None and part_of(name, self.scheme) is not None

    def read(self, name: str, dtype: ir.DataType) -> torch.Tensor:
        """The numbers of an initializer; those of less than a byte packed into bytes."""
        if self._parts is not None and self._is_part(name):
            return self._parts.data(name)
        source = name.removesuffix(TRANSPOSED_SUFFIX)
        tensor = self.rope[source] if source in self.rope else self.checkpoint.read(source)
        if source != name:
            tensor = tensor.T
        return tensor.to(getattr(torch, BY_ONNX[dtype].name))


def write_weights(
    path: Path,
    models: Iterable[ir.Model],
    sources: TensorSources,
    *,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write the weight file of `models` and point their initializers at it.

    Args:
        path: the file; its name becomes the `location` of the external data.
        models: traced graphs whose initializers carry checkpoint names, some with the transpose suffix, or names of
            `QuantizeWeightsPass`.
        sources: where the numbers come from.
        advance: told the bytes of each tensor once it is written.
    """
    values = [sources.initializers(model) for model in models]
    plan = _plan(values)
    with path.open("wb") as file:
        header = _header(plan)
        file.write(header)
        for stored in plan.values():
            data = sources.read(stored.name, stored.dtype).contiguous()
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
            advance(stored.nbytes)
    for initializers in values:
        for name, value in initializers.items():
            stored = plan[name]
            value.const_value = ir.ExternalTensor(
                path.name,
                len(header) + stored.begin,
                stored.nbytes,
                stored.dtype,
                shape=ir.Shape(stored.shape),
                name=name,
                base_dir=path.parent,
            )


def _plan(values: Iterable[Mapping[str, ir.Value]]) -> dict[str, StoredTensor]:
    wanted: dict[str, tuple[ir.DataType, tuple[int, ...]]] = {}
    for initializers in values:
        for name, value in initializers.items():
            assert value.dtype is not None and value.shape is not None
            found = (value.dtype, value.shape.numpy())
            if wanted.setdefault(name, found) != found:
                raise ValueError(f"initializer {name!r} is {found} in one graph and {wanted[name]} in another")
    plan, begin = {}, 0
    for name in sorted(wanted):
        dtype, shape = wanted[name]
        nbytes = math.ceil(math.prod(shape) * dtype.itemsize)
        plan[name] = StoredTensor(name, dtype, shape, begin, nbytes)
        begin += nbytes
    return plan


def _stored_shape(stored: StoredTensor) -> list[int]:
    """safetensors has no numbers of 4 bits: their rows are bytes there, or all of them where a row is no whole byte."""
    if stored.dtype != ir.DataType.UINT4:
        return list(stored.shape)
    *rows, columns = stored.shape
    return [*rows, columns // 2] if columns % 2 == 0 else [stored.nbytes]


def _header(plan: Mapping[str, StoredTensor]) -> bytes:
    entries = {
        stored.name: {
            "dtype": BY_ONNX[stored.dtype].tag,
            "shape": _stored_shape(stored),
            "data_offsets": [stored.begin, stored.begin + stored.nbytes],
        }
        for stored in plan.values()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
