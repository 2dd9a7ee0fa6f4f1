"""A device without CUDA and engines that are ONNX Runtime on a lowered graph: a Runner of engines on any machine.

`verify --lowering` judges the two graphs of a bounded cache with it, through the very runner that drives an engine, and
tests hold that runner against others. It is as strict as a GPU, or stricter: an address must lie in memory that is
alive, shapes must fit the profile, copies must be of equal size, and recorded work is done on the addresses that it was
recorded with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from doge_deploy.bundle.engine_record import EngineTensor, Interface
from doge_deploy.bundle.signature import BATCH, CACHE_ROWS, SEQUENCE
from doge_deploy.dtypes import item_bytes
from doge_deploy.runtime.trt.device import Bytes, Device, Graph, HostMemory, Memory
from doge_deploy.runtime.trt.runner import RAW_DTYPES, Context, Engine, numbers


class _HostMemory(Memory, HostMemory):
    def __init__(self, nbytes: int, fill: int) -> None:
        self.array = np.full(nbytes, fill, np.uint8)
        self.address = int(self.array.ctypes.data)
        self.nbytes = nbytes


class _HostGraph(Graph):
    def __init__(self, device: HostDevice, work: list[Callable[[], None]]) -> None:
        self._device, self._work = device, work

    def launch(self) -> None:
        self._device.launches += 1
        for one in self._work:
            one()


class HostDevice(Device):
    """Does everything at once, or records it."""

    name = "a stand-in"
    compute_capability = "8.9"
    stream = 7

    def __init__(self) -> None:
        self._alive: weakref.WeakValueDictionary[int, _HostMemory] = weakref.WeakValueDictionary()
        self._recording: list[Callable[[], None]] | None = None
        self.launches = 0
        self.recordings = 0

    def part(self, address: int, nbytes: int) -> Bytes:
        """The bytes at an address, all in one piece of memory that is still there."""
        for memory in self._alive.values():
            begin = address - memory.address
            if begin >= 0 and begin + nbytes <= memory.nbytes:
                return memory.array[begin : begin + nbytes]
        raise AssertionError("this memory is no longer there, or ends before")

    def allocate(self, nbytes: int) -> _HostMemory:
        memory = _HostMemory(nbytes, 0)
        self._alive[memory.address] = memory
        return memory

    def allocate_host(self, nbytes: int) -> _HostMemory:
        return _HostMemory(nbytes, 0xFF)  # NaN, or a negative number, until it is written

    def upload(self, source: HostMemory, target: Memory) -> None:
        self._copy(source, target)

    def download(self, source: Memory, target: HostMemory) -> None:
        self._copy(source, target)

    def _copy(self, source: Any, target: Any) -> None:
        assert source.nbytes == target.nbytes
        reference = weakref.ref(source), weakref.ref(target)

        def copy() -> None:
            left, right = (one() for one in reference)
            assert left is not None and right is not None, "a copy of memory that is no longer there"
            right.array[:] = left.array

        self.do(copy)

    def copy(self, source: Memory, source_begin: int, target: Memory, target_begin: int, nbytes: int) -> None:
        left = self.part(source.address + source_begin, nbytes)
        right = self.part(target.address + target_begin, nbytes)
        assert not np.shares_memory(left, right)
        self.do(lambda: np.copyto(right, left))

    def clear(self, memory: Memory, begin: int, nbytes: int) -> None:
        self.do(lambda: self.part(memory.address + begin, nbytes).fill(0))

    def do(self, work: Callable[[], None]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def synchronize(self) -> None:
        assert self._recording is None, "nothing can be waited for while work is recorded"

    def record(self, work: Callable[[], None]) -> _HostGraph:
        self.recordings += 1
        self._recording = []
        work()
        recorded, self._recording = self._recording, None
        return _HostGraph(self, recorded)


class OrtEngine(Engine):
    """A session of a lowered graph, as the network of that record.

    Args:
        session: of the graph, in ONNX Runtime.
        record: what a network that is built of it takes.
        device: where memory is.
        records_itself: see `Engine`.
    """

    def __init__(self, session: Any, record: Interface, device: HostDevice, *, records_itself: bool = False) -> None:
        self.session = session
        self.record = record
        self.device = device
        self.records_itself = records_itself
        self.contexts: list[OrtContext] = []
        self.types = {value.name: value.type for value in session.get_inputs()}
        declared = {tensor.name for tensor in record.outputs}
        self.extra_outputs = [value.name for value in session.get_outputs() if value.name not in declared]
        self.extra: dict[str, np.ndarray[Any, Any]] = {}
        """Values of `extra_outputs` in the last run."""

    def create_context(self) -> OrtContext:
        self.contexts.append(OrtContext(self))
        return self.contexts[-1]


class OrtContext(Context):
    """Runs the session on what is bound."""

    def __init__(self, engine: OrtEngine) -> None:
        self.engine = engine
        self.bindings: list[tuple[int, tuple[int, int]]] = []
        """Profile and `[B, Q]` of every binding."""
        self.runs = 0

    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        record = self.engine.record
        rows, width = shapes["input_ids"]
        self.sizes = {BATCH: rows, SEQUENCE: width}
        folded = [tensor.name for tensor in record.inputs if CACHE_ROWS in tensor.shape]
        if folded:
            self.sizes[CACHE_ROWS] = shapes[folded[0]][0]
        assert record.profiles[profile].allows(**self.sizes)
        assert set(addresses) == {tensor.name for tensor in (*record.inputs, *record.outputs)}
        self.bindings.append((profile, (rows, width)))
        self.addresses = dict(addresses)
        for name, shape in shapes.items():
            assert shape == self._shape(record.tensor(name))
        for tensor in record.outputs:
            past = record.aliases.get(tensor.name)
            if past is not None:
                assert addresses[tensor.name] == addresses[past], "the cache is not written in place"
            else:
                own = self._view(tensor)
                others = (self._view(one) for one in record.inputs)
                assert not any(np.shares_memory(own, other) for other in others), "an output overwrites an input"

    def _shape(self, tensor: EngineTensor) -> tuple[int, ...]:
        return tuple(self.sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)

    def _view(self, tensor: EngineTensor) -> np.ndarray[Any, Any]:
        """What is bound, bfloat16 as its bits."""
        shape = self._shape(tensor)
        part = self.engine.device.part(self.addresses[tensor.name], int(np.prod(shape)) * item_bytes(tensor.dtype))
        return part.view(RAW_DTYPES[tensor.dtype]).reshape(shape)

    def _fed(self, tensor: EngineTensor) -> np.ndarray[Any, Any]:
        """An input as the session takes it."""
        held = self._view(tensor)
        return held.astype(np.int64) if "int64" in self.engine.types[tensor.name] else numbers(held, tensor)

    def enqueue(self) -> None:
        self.engine.device.do(self._run)

    def _run(self) -> None:
        self.runs += 1
        record = self.engine.record
        feeds = {tensor.name: self._fed(tensor) for tensor in record.inputs}
        names = [*(tensor.name for tensor in record.outputs), *self.engine.extra_outputs]
        made = dict(zip(names, self.engine.session.run(names, feeds), strict=True))
        self.engine.extra = {name: made.pop(name) for name in self.engine.extra_outputs}
        for tensor, value in zip(record.outputs, made.values(), strict=True):
            if tensor.dtype == "bfloat16":
                value = (value.view(np.uint32) >> 16).astype(np.uint16)  # a bfloat16 number: the rest is zero
            self._view(tensor)[:] = value
