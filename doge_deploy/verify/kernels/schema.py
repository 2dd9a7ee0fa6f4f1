"""What a file of `plugins record` holds. The annotations are the schema; texts of 64 digits name tensors by hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from doge_deploy.bundle.typed_json import Check
from doge_deploy.verify.recording.schema import Amount, Count, Hash, Shape

KIND = "doge-deploy kernels 1"

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8"]

Grid = Annotated[tuple[Count, ...], Check("three whole numbers >= 1", lambda grid: len(grid) == 3)]
Threads = Annotated[int, Check("1 to 1024", lambda number: 1 <= number <= 1024)]
Bytes = Annotated[int, Check("a whole number >= 0", lambda number: number >= 0)]


@dataclass(frozen=True)
class Value:
    """A tensor of a node, by what it is made of."""

    dtype: DType
    shape: Shape
    data: Hash | None = None
    """Of an input: its numbers. None for what a kernel makes."""


@dataclass(frozen=True)
class Launch:
    """One kernel of a node's chain, as an engine launches it."""

    plugin: str
    """`doge::DynamicMaskSelect`."""
    ptx: Hash
    """Its text, uint8."""
    ptx_sha256: Hash
    """Of the text itself, as in the record of `plugins compile`."""
    entry: str
    grid: Grid
    threads: Threads
    """Of each program."""
    shared_memory_bytes: Bytes
    """Dynamic, of each program."""
    constants: Mapping[str, str | int | float]
    """What was compiled in; an interpreter needs them."""
    arguments: tuple[str | int, ...]
    """In the order of the kernel's parameters: the name of a value, or an int32."""
    memory_bytes: Bytes | None
    """Each byte that has to cross the memory bus, once; None of a kernel without a cost model."""
    flops: Bytes | None


@dataclass(frozen=True)
class Expectation:
    """What a value must be when all launches are done."""

    data: Hash
    max_abs: Amount | None
    """How far the largest error may be; None where every number must be equal."""
    rms: Amount | None
    ignored: int | None = None
    """Of a value of which not all is written: what stands where nothing is."""


@dataclass(frozen=True)
class Node:
    """One node of the `doge` domain on inputs of its own."""

    name: str
    """What it is, for people."""
    arch: int
    """Compute capability: 90."""
    values: Mapping[str, Value]
    launches: Annotated[tuple[Launch, ...], Check("a list of at least one launch", lambda items: len(items) > 0)]
    expected: Mapping[str, Expectation]


@dataclass(frozen=True)
class KernelRecording:
    """The document."""

    made_with: Mapping[str, str]
    """Libraries and their versions."""
    nodes: Annotated[tuple[Node, ...], Check("a list of at least one node", lambda items: len(items) > 0)]
