"""One stored tensor: its bytes, or its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from doge_deploy.checkpoint.headers import TensorInfo
from doge_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 1 << 20


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor in its stored dtype, backed by a memory map of its file.

    Raises:
        UnsupportedModelError: the file was changed since it was opened.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(info.file, framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(info.name)
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"{info.file}: {info.name} cannot be read: {' '.join(str(error).split())}"
        ) from error
    return tensor


def stored_bytes(info: TensorInfo) -> Iterator[bytes]:
    """The stored bytes of a tensor, a chunk at a time.

    Raises:
        UnsupportedModelError: the file ends early.
    """
    with info.file.open("rb") as file:
        file.seek(info.offset)
        left = info.nbytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise UnsupportedModelError(f"{info.file}: truncated: {info.name} lacks its last {left} bytes")
            left -= len(chunk)
            yield chunk


def add_to_digest(digest: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """Name, dtype, shape and bytes of every tensor, ordered by name, into a hash of `hashlib`."""
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(f"{name}\0{info.dtype}\0{','.join(map(str, info.shape))}\0".encode())
        for chunk in stored_bytes(info):
            digest.update(chunk)
