"""The weight file: one safetensors file that every graph of a bundle refers to as ONNX external data.

A tensor is written once, whichever graphs use it, and read from the checkpoint one at a time: peak memory is the
largest tensor, not the model.
Reference: https://github.com/huggingface/safetensors (format); onnx.proto `TensorProto.external_data`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from doge_deploy.checkpoint import Checkpoint
from doge_deploy.graph.passes.transpose_weights import TRANSPOSED_SUFFIX
from doge_deploy.model.rope import ROPE_TENSORS

WEIGHTS_FILE = "weights.safetensors"

# safetensors' name of a dtype, and the dtype to convert to.
_DTYPES = {
    ir.DataType.FLOAT: ("F32", torch.float32),
    ir.DataType.FLOAT16: ("F16", torch.float16),
    ir.DataType.BFLOAT16: ("BF16", torch.bfloat16),
}

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


def stored_initializers(model: ir.Model, names: Iterable[str]) -> dict[str, ir.Value]:
    """The initializers of `model` that stand for one of the checkpoint's `names`, or for RoPE."""
    known = {*names, *ROPE_TENSORS}
    return {
        name: value for name, value in model.graph.initializers.items() if name.removesuffix(TRANSPOSED_SUFFIX) in known
    }


def write_weights(
    path: Path,
    models: Iterable[ir.Model],
    checkpoint: Checkpoint,
    rope: Mapping[str, torch.Tensor],
    *,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write the weight file of `models` and point their initializers at it.

    Args:
        path: the file; its name becomes the `location` of the external data.
        models: traced graphs whose initializers carry checkpoint names, some with the transpose suffix.
        checkpoint: where the numbers come from; they are cast to the initializer's dtype.
        rope: see `doge_deploy.model.rope.rope_tensors`.
        advance: told the bytes of each tensor once it is written.
    """
    values = [stored_initializers(model, checkpoint.tensors) for model in models]
    plan = _plan(values)
    with path.open("wb") as file:
        header = _header(plan)
        file.write(header)
        for stored in plan.values():
            data = _data(stored, checkpoint, rope)
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
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        plan[name] = StoredTensor(name, dtype, shape, begin, int(nbytes))
        begin += int(nbytes)
    return plan


def _header(plan: Mapping[str, StoredTensor]) -> bytes:
    entries = {
        stored.name: {
            "dtype": _DTYPES[stored.dtype][0],
            "shape": list(stored.shape),
            "data_offsets": [stored.begin, stored.begin + stored.nbytes],
        }
        for stored in plan.values()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _data(stored: StoredTensor, checkpoint: Checkpoint, rope: Mapping[str, torch.Tensor]) -> torch.Tensor:
    name = stored.name.removesuffix(TRANSPOSED_SUFFIX)
    tensor = rope[name] if name in rope else checkpoint.read(name)
    if stored.name != name:
        tensor = tensor.T
    return tensor.to(_DTYPES[stored.dtype][1]).contiguous()
