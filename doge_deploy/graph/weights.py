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

from doge_deploy.bundle.files import FileEntry, HashedFile
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.dtypes import BY_ONNX, DTYPES
from doge_deploy.graph.passes.store_weights import StoreWeightsPass
from doge_deploy.graph.weight_file import TRANSPOSED_SUFFIX
from doge_deploy.graph.weight_formats import PartSource, WeightFormat

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
    """Where the numbers of a graph's initializers come from: the checkpoint, the RoPE tables, and a weight format.

    The parts of one weight are made together, so ask for them one after another.

    Args:
        checkpoint: where weights are read from; they are cast to the initializer's dtype.
        rope: see `doge_deploy.model.rope.rope_tensors`.
        weight_format: how matrices are stored; None for the dtype of the graph.
    """

    def __init__(
        self, checkpoint: Checkpoint, rope: Mapping[str, torch.Tensor], weight_format: WeightFormat | None
    ) -> None:
        self.checkpoint = checkpoint
        self.rope = rope
        self.weight_format = weight_format
        self._latest: tuple[str, dict[str, torch.Tensor]] | None = None
        self.left: dict[str, str] = {}
        """Tensors that keep the dtype of the graph though another format was asked for -> why."""

    def rewrite(self, model: ir.Model) -> None:
        """Store the weights of a traced graph in the format, in place, where one was asked for."""
        if self.weight_format is not None:
            step = StoreWeightsPass(self.weight_format)
            step(model)
            self.left |= step.left

    def initializers(self, model: ir.Model) -> dict[str, ir.Value]:
        """The initializers of `model` that this is the source of."""
        known = {*self.checkpoint.tensors, *self.rope}
        found = {}
        for name, value in model.graph.initializers.items():
            assert value.dtype is not None
            part = self.part_of(name, BY_ONNX[value.dtype].name)
            if part is not None or name.removesuffix(TRANSPOSED_SUFFIX) in known:
                found[name] = value
        return found

    def part_of(self, name: str, dtype: str) -> PartSource | None:
        """What an initializer is a part of, where weights have a format and it is one."""
        return None if self.weight_format is None else self.weight_format.part_of(name, dtype)

    def read(self, name: str, dtype: str) -> torch.Tensor:
        """The numbers of an initializer as the weight file has them: those of less than a byte packed into bytes.

        Args:
            name: of the initializer.
            dtype: `DType.name`.
        """
        part = self.part_of(name, dtype)
        if part is not None:
            return packed(self._read_part(part), DTYPES[part.dtype].bits)
        source = name.removesuffix(TRANSPOSED_SUFFIX)
        tensor = self.rope[source] if source in self.rope else self.checkpoint.read(source)
        if source != name:
            tensor = tensor.T
        return tensor.to(getattr(torch, dtype))

    def _read_part(self, part: PartSource) -> torch.Tensor:
        assert self.weight_format is not None
        if not part.tensor:
            return self.weight_format.constant(part.key)
        if self._latest is None or self._latest[0] != part.tensor:
            self._latest = part.tensor, self.weight_format.numbers(self.checkpoint.read(part.tensor), part.tensor)
        return self._latest[1][part.key]


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of 4 bits, from -8 to 15, as bytes; of two the first is in the low half. Others as they are."""
    if bits >= 8:
        return values
    if bits != 4:
        raise ValueError(f"numbers of {bits} bits cannot be packed; of 4 they can")
    flat = values.reshape(-1).to(torch.uint8) & 15
    if len(flat) % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return flat[0::2] | (flat[1::2] << 4)


def write_weights(
    path: Path,
    models: Iterable[ir.Model],
    sources: TensorSources,
    *,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> FileEntry:
    """Write the weight file of `models` and point their initializers at it; returns what a manifest says of it.

    Args:
        path: the file; its name becomes the `location` of the external data.
        models: traced graphs whose initializers carry checkpoint names, some with the transpose suffix, or names of
            a weight format's parts.
        sources: where the numbers come from.
        advance: told the bytes of each tensor once it is written.
    """
    values = [sources.initializers(model) for model in models]
    plan = _plan(values)
    header = _header(plan)
    with HashedFile(path) as file:
        file.write(header)
        for stored in plan.values():
            data = sources.read(stored.name, BY_ONNX[stored.dtype].name).contiguous()
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
    return file.entry()


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
        nbytes = BY_ONNX[dtype].nbytes(math.prod(shape))
        plan[name] = StoredTensor(name, dtype, shape, begin, nbytes)
        begin += nbytes
    return plan


def _stored_shape(stored: StoredTensor) -> list[int]:
    """safetensors has no numbers of 4 bits: their rows are bytes there, or all of them where a row is no whole byte."""
    if BY_ONNX[stored.dtype].bits >= 8:
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
