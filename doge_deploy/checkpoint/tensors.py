"""One stored tensor: its bytes, or its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from doge_deploy.checkpoint.headers import TensorInfo
from doge_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 8 << 20
"""Hashed at once. Between two chunks a thread waits for its turn of the interpreter, up to 5 ms."""


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor in its stored dtype, in memory of its own.

    Not a memory map of its file, which safetensors would give: each tensor of an export is read once for each thing
    that is done, and to map its pages one by one takes longer than to copy them.

    Raises:
        UnsupportedModelError: the file cannot be read, or was made shorter since it was opened.
    """
    import numpy as np
    import torch

    data = np.empty(info.nbytes, np.uint8)  # NumPy asks for large pages, which need not be cleared one by one
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            left = data.data
            while left:
                count = file.readinto(left)
                if not count:
                    raise _truncated(info, len(left))
                left = left[count:]
    except OSError as error:
        raise UnsupportedModelError(f"{info.file}: {info.name} cannot be read: {error.strerror}") from error
    return torch.from_numpy(data).view(getattr(torch, info.dtype)).reshape(info.shape)


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
                raise _truncated(info, left)
            left -= len(chunk)
            yield chunk


def _truncated(info: TensorInfo, left: int) -> UnsupportedModelError:
    return UnsupportedModelError(f"{info.file}: truncated: {info.name} lacks its last {left} bytes")


def add_to_digest(digest: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """Name, dtype, shape and bytes of every tensor, ordered by name, into a hash of `hashlib`."""
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(f"{name}\0{info.dtype}\0{','.join(map(str, info.shape))}\0".encode())
        for chunk in stored_bytes(info):
            digest.update(chunk)
