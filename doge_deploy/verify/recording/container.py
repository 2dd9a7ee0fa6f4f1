"""A file of tensors that are called by the hash of their content, with a JSON document that names them: safetensors.

The document is in the header's metadata. Its own hash stands beside it, and it refers to tensors by theirs: so the hash
of the document is that of everything, and the same content gives the same bytes.
Reference: https://github.com/huggingface/safetensors (format). No library is needed to read it, and nothing in it is
executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.bundle.typed_json import no_constant, no_duplicates
from doge_deploy.checkpoint.headers import TensorInfo, read_header
from doge_deploy.dtypes import BY_TAG, DTYPES
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.kernels.interpreter import round_to_bfloat16, widen_bfloat16
from doge_deploy.verify.compare import Array

_ALIGNMENT = 8
"""Of the data, for readers that map the file."""


class Tensors:
    """Tensors that are going to be written, each once."""

    def __init__(self) -> None:
        self.stored: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
        """By hash: name of the dtype, shape, bytes."""

    def add(self, array: Array, dtype: str | None = None) -> str:
        """Take an array, and give its hash.

        Args:
            array: numbers.
            dtype: what they are stored as, a key of `DTYPES`, which must hold them exactly; NumPy's own where None.

        Raises:
            ValueError: it does not.
        """
        name = str(array.dtype) if dtype is None else dtype
        data = np.ascontiguousarray(_narrowed(array, name))
        if data.dtype.kind == "f" or name == "bfloat16":
            if not np.array_equal(_widened(data, name), array, equal_nan=True):
                raise ValueError(f"{name} does not hold these numbers")
        elif not np.array_equal(data, array):
            raise ValueError(f"{name} does not hold these numbers")
        data = data.astype(data.dtype.newbyteorder("<"), copy=False)
        digest = content_hash(name, data.shape, data.tobytes())
        self.stored[digest] = name, data.shape, data.tobytes()
        return digest


def content_hash(dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    """sha256 of a tensor's type, shape and bytes."""
    head = f"{dtype} {'x'.join(map(str, shape))}\n".encode()
    return hashlib.sha256(head + data).hexdigest()


def _narrowed(array: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return round_to_bfloat16(array.astype(np.float32))
    return array.astype(dtype)


def _widened(data: Array, dtype: str) -> Array:
    return widen_bfloat16(data) if dtype == "bfloat16" else data


def write_container(path: Path, kind: str, document: Mapping[str, Any], tensors: Tensors) -> str:
    """Write the file, whole or not at all; returns the hash of everything in it.

    Args:
        path: of the file; an older one is replaced.
        kind: what the file is, for readers: `doge-deploy recording 1`.
        document: JSON.
        tensors: what it refers to.

    Raises:
        UsageError: the file cannot be written.
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    header: dict[str, Any] = {"__metadata__": {"document": text, "kind": kind, "sha256": digest}}
    offset, parts = 0, []
    for name, (dtype, shape, data) in sorted(tensors.stored.items()):
        header[name] = {"data_offsets": [offset, offset + len(data)], "dtype": DTYPES[dtype].tag, "shape": list(shape)}
        offset += len(data)
        parts.append(data)
    head = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT)
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(b"".join([len(head).to_bytes(8, "little"), head, *parts]))
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    return digest


@dataclass(frozen=True)
class Container:
    """A file that was read and found whole: its document's hash is right; each tensor's is checked when it is read."""

    path: Path
    document: Any
    sha256: str
    """Of the document, and by it of everything."""
    infos: Mapping[str, TensorInfo] = field(repr=False)

    def read(self, digest: str, dtypes: tuple[str, ...], what: str) -> Array:
        """A tensor by its hash, bfloat16 widened to float32; see `stored`."""
        dtype, stored = self.stored(digest, dtypes, what)
        return _widened(stored, dtype)

    def stored(self, digest: str, dtypes: tuple[str, ...], what: str) -> tuple[str, Array]:
        """A tensor by its hash: its type, and its numbers, bfloat16 as bit patterns of uint16.

        Args:
            digest: its name.
            dtypes: the types that it may have.
            what: what it is, for messages.

        Raises:
            UnsupportedModelError: it is not there, is of another type, or its bytes are not those of its hash.
        """
        info = self.infos.get(digest)
        if info is None:
            raise self.damaged(f"{what} is not in it")
        dtype = BY_TAG[info.dtype].name if info.dtype in BY_TAG else info.dtype
        if dtype not in dtypes:
            raise self.damaged(f"{what} is {dtype}, must be {' or '.join(dtypes)}")
        try:
            with self.path.open("rb") as file:
                file.seek(info.offset)
                data = file.read(info.nbytes)
        except OSError as error:
            raise UnsupportedModelError(f"{self.path} cannot be read: {error.strerror}") from error
        if content_hash(dtype, info.shape, data) != digest:
            raise self.damaged(f"{what} was altered")
        stored = np.frombuffer(data, np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<"))
        return dtype, stored.astype(stored.dtype.newbyteorder("=")).reshape(info.shape)

    def check(self) -> None:
        """Raises UnsupportedModelError where a tensor's bytes are not those of its hash."""
        for digest, info in self.infos.items():
            dtype = BY_TAG[info.dtype].name if info.dtype in BY_TAG else info.dtype
            if dtype not in DTYPES or DTYPES[dtype].bits < 8:
                raise self.damaged(f"a tensor is {dtype}")
            self.stored(digest, (dtype,), "a tensor")

    def damaged(self, finding: str) -> UnsupportedModelError:
        """The error that says so."""
        return UnsupportedModelError(f"{self.path} is damaged: {finding}")


def read_container(path: Path, kind: str, wanted: str) -> Container:
    """Open a file that `write_container` wrote, and check every byte; tensors are kept when they are asked for.

    Args:
        path: of the file.
        kind: what it must be, as `write_container` was told.
        wanted: the same for people, with the command that writes it.

    Raises:
        UsageError: there is no such file.
        UnsupportedModelError: it is damaged, or not of that kind.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give {wanted}")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] not in (b"{", b""):  # neither one of safetensors nor cut off
        raise UnsupportedModelError(f"{path} is not {wanted}")
    infos = read_header(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length)).get("__metadata__")  # read_header parsed it already
    if not isinstance(metadata, dict) or metadata.get("kind") != kind:
        found = metadata.get("kind") if isinstance(metadata, dict) else None
        raise UnsupportedModelError(f"{path} is not {wanted}" + (f"; it is a {found!r}" if found else ""))
    text, digest = metadata.get("document"), metadata.get("sha256")
    if not isinstance(text, str) or hashlib.sha256(text.encode()).hexdigest() != digest:
        raise UnsupportedModelError(f"{path} is damaged: its document does not have the hash that stands beside it")
    try:
        document = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} is damaged: its document is no JSON: {error}") from None
    container = Container(path, document, str(digest), infos)
    container.check()
    return container
