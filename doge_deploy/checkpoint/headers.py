"""Names, dtypes, shapes and places of stored tensors, from safetensors headers alone.

They are parsed here because a damaged file must be described, and the safetensors package says only that a
header is invalid.
Reference: the format section of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doge_deploy.diagnostics import join_findings
from doge_deploy.dtypes import BY_TAG
from doge_deploy.errors import UnsupportedModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.bin")

_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
"""No separators: a path would let a checkpoint read files outside its directory."""

_HERE = re.compile(r"^(\./+)+")
"""Some writers of an index put `./` before a file's name."""

_LFS_POINTER = b"version https://git-lfs"

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: `nbytes` bytes of `dtype`, row by row, from `offset` of `file` on.

    `dtype` is `DType.name` where a Doge's weights may have it, else the name in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def has_weights(directory: Path) -> bool:
    """Whether a directory has weights of its own, in safetensors or as a pickle."""
    return any((directory / name).exists() for name in (WEIGHTS, INDEX, "pytorch_model.bin"))


def lacks_metadata(directory: Path) -> bool:
    """Whether the weights are in shards whose index has no `metadata`, without which transformers cannot read them."""
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        return False
    return "metadata" not in read_json(directory / INDEX)


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """All tensors stored in a checkpoint, whether in one file or in shards; no data is read.

    Raises:
        UnsupportedModelError: no safetensors there, shards missing, or a file is truncated or damaged.
    """
    # transformers prefers the single file too, if both are there
    if (directory / WEIGHTS).exists():
        return read_header(directory / WEIGHTS)
    if (directory / INDEX).exists():
        return _read_shards(directory)
    pickles = sorted({path.name for pattern in _PICKLES for path in directory.glob(pattern)})
    if pickles:
        names = ", ".join(pickles)
        raise UnsupportedModelError(
            f"{directory}: weights are a pickle, which is never loaded; convert to safetensors: {names}"
        )
    raise UnsupportedModelError(f"{directory}: no weights; must hold {WEIGHTS} or {INDEX} with its shards")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        UnsupportedModelError: the file cannot be read, is truncated, or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8:
                raise UnsupportedModelError(f"{path}: truncated: at least 8 bytes expected, {size} there")
            if start == _LFS_POINTER[:8]:
                raise UnsupportedModelError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` there")
            if length > _MAX_HEADER_BYTES:
                raise UnsupportedModelError(f"{path}: not a safetensors file: it announces a header of {length} bytes")
            if 8 + length > size:
                raise UnsupportedModelError(f"{path}: truncated: at least {8 + length} bytes expected, {size} there")
            header = _parse_header(path, file.read(length))
    except OSError as error:
        raise UnsupportedModelError(f"{path}: cannot be read: {error.strerror}") from None
    infos = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_extent(path, infos, 8 + length, size)
    return infos


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise UnsupportedModelError(f"{path}: damaged header: {error}") from None
    except (ValueError, RecursionError):
        raise UnsupportedModelError(f"{path}: not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise UnsupportedModelError(f"{path}: not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One header entry, refused unless its dtype, shape and offsets agree."""
    if not name.isprintable():  # it would be printed, in messages and by `inspect`
        raise UnsupportedModelError(f"{path}: damaged header: {name!r} cannot be the name of a tensor")
    try:
        dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError):
        raise UnsupportedModelError(f"{path}: damaged header: entry {name!r} is {entry!r}") from None
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise UnsupportedModelError(f"{path}: damaged header: entry {name!r} is {entry!r}")
    if dtype in BY_TAG and end - begin != BY_TAG[dtype].nbytes(math.prod(shape)):
        raise UnsupportedModelError(
            f"{path}: damaged header: {name!r} {dtype} {list(shape)} is given {end - begin} bytes"
        )
    known = BY_TAG.get(dtype)
    name_of_dtype = known.name if known and known.short else dtype
    return TensorInfo(name, path, name_of_dtype, shape, data_start + begin, end - begin)


def _check_extent(path: Path, infos: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """The tensors must fill the file from the header to its end, without holes or overlaps."""
    end = data_start
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            raise UnsupportedModelError(
                f"{path}: damaged header: {info.name!r} starts at byte {info.offset}, must start at {end}"
            )
        end += info.nbytes
    if end > size:
        raise UnsupportedModelError(f"{path}: truncated: {end} bytes expected, {size} there")
    if end < size:
        raise UnsupportedModelError(f"{path}: {size - end} bytes too long: {end} bytes expected, {size} there")


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX
    weight_map = _read_weight_map(index)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (directory / file).exists()]
    if missing:
        raise UnsupportedModelError(f"{index}: shards missing: {join_findings(missing)}")
    infos: dict[str, TensorInfo] = {}
    findings = []
    for file in files:
        for name, info in read_header(directory / file).items():
            if name in infos:
                findings.append(f"{name} is in both {infos[name].file.name} and {file}")
            infos[name] = info
    for name, file in weight_map.items():
        if name not in infos:
            findings.append(f"{name!r} is not in {file}")
    if findings:
        raise UnsupportedModelError(f"{index}: {join_findings(findings)}")
    return infos


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedModelError(f"{index}: must have 'weight_map', an object of tensor names and file names")
    for name, file in weight_map.items():
        if isinstance(file, str):
            weight_map[name] = file = _HERE.sub("", file)
        if not (isinstance(file, str) and _SHARD_NAME.fullmatch(file)):
            raise UnsupportedModelError(f"{index}: {name!r} is in {file!r}: must be the name of a .safetensors file")
    return weight_map


class _DuplicateKeyError(ValueError):
    """Of two equal keys Python, like most readers, lets the last one win without a word."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateKeyError(f"key {twice!r} stands twice")
    return result


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UnsupportedModelError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise UnsupportedModelError(f"{path}: missing") from None
    except OSError as error:
        raise UnsupportedModelError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UnsupportedModelError(
            f"{path}: not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except _DuplicateKeyError as error:
        raise UnsupportedModelError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UnsupportedModelError(f"{path}: must be a JSON object, not a {type(document).__name__}")
    return document
