"""A Runner on an engine.

Caches are device buffers that are bound as past and present: the engine writes them in place, some rows alone from the
address of the first of them on. A decode step copies a few numbers to the device and runs; both are recorded once as a
CUDA graph, and each further step is one launch. Logits stay on the device until they are asked for.

Axes: B rows, Q tokens of a call, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from doge_deploy.bundle.engine_record import EngineTensor
from doge_deploy.bundle.signature import PAST_ROPE, PRESENT_ROPE, Signature
from doge_deploy.devices.tensorrt_limits import TENSORRT_DTYPES
from doge_deploy.runtime.base import FloatArray, IntArray
from doge_deploy.runtime.logits import Logits, check_current
from doge_deploy.runtime.rows import ChangingAngles, RowsRunner, row_range
from doge_deploy.runtime.trt.device import Device, Graph, HostMemory, Memory
from doge_deploy.runtime.trt.plan import BindingPlan, CacheBuffer, nbytes


class Context(ABC):
    """An engine with one set of shapes and addresses (an execution context)."""

    @abstractmethod
    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Choose a profile, set the shapes of inputs and the address of every input and output."""

    @abstractmethod
    def enqueue(self) -> None:
        """Put one run of the engine into the device's stream.

        Raises:
            UnsupportedModelError: the vendor's library refuses; in its own words.
        """


class Engine(ABC):
    """A loaded engine."""

    records_itself: bool
    """The vendor's library makes CUDA graphs of its own."""

    @abstractmethod
    def create_context(self) -> Context:
        """A new context; all contexts of an engine share their scratch memory and must run one after the other."""


class _Staging:
    """A tensor of a call on both sides."""

    def __init__(self, device: Device, tensor: EngineTensor, shape: tuple[int, ...]) -> None:
        size = nbytes(tensor, shape)
        self.tensor = tensor
        self.memory: Memory = device.allocate(size)
        self.host: HostMemory = device.allocate_host(size)
        self.array = self.host.array.view(RAW_DTYPES[tensor.dtype]).reshape(shape)


class _Call:
    """Everything for calls of one shape over the same rows.

    Args:
        device: where it runs.
        plan: of the network.
        context: of the network.
        caches: where its caches lie, under the names of past and present.
        first, rows, width: the first row, R and Q.
    """

    def __init__(
        self,
        device: Device,
        plan: BindingPlan,
        context: Context,
        caches: Mapping[str, int],
        first: int,
        rows: int,
        width: int,
    ) -> None:
        shapes = plan.call_shapes(rows, width)
        self.key = first, rows, width
        self.context = context
        self.inputs = {tensor.name: _Staging(device, tensor, shapes[tensor.name]) for tensor in plan.inputs}
        self.outputs = {tensor.name: _Staging(device, tensor, shapes[tensor.name]) for tensor in plan.outputs}
        addresses = {name: staging.memory.address for name, staging in {**self.inputs, **self.outputs}.items()}
        context.bind(plan.profile(rows, width), plan.input_shapes(rows, width), {**addresses, **caches})
        self.runs = 0
        self.graph: Graph | None = None


class _DeviceLogits(Logits):
    """Logits on the device, until somebody asks."""

    def __init__(self, runner: TrtRunner, staging: _Staging) -> None:
        self._runner, self._staging = runner, staging
        self._number = runner.runs
        self._host: FloatArray | None = None

    def _read(self) -> tuple[FloatArray, bool]:
        if self._host is None:
            check_current(self._runner.runs == self._number)
            self._runner.device.download(self._staging.memory, self._staging.host)
            self._runner.settle()
            self._host = numbers(self._staging.array, self._staging.tensor)
        return self._host, True


MOST_STEPS = 16
"""Kinds of decode steps, by their rows, that are kept recorded: each has an execution context of its own."""


class TrtRunner(RowsRunner):
    """An engine of TensorRT or TensorRT-RTX."""

    def __init__(
        self,
        engine: Engine,
        device: Device,
        plan: BindingPlan,
        signature: Signature,
        *,
        max_length: int,
        last: bool,
        whole_calls: bool,
        angles: ChangingAngles | None,
    ) -> None:
        super().__init__(max_length=max_length, last_logits=last)
        self.whole_calls, self.angles = whole_calls, angles
        self.device = device
        self.plan = plan
        self.signature = signature
        logits = next(tensor for tensor in plan.outputs if tensor.name == "logits")
        assert isinstance(logits.shape[-1], int)
        self.vocab_size = logits.shape[-1]
        self.extra: dict[str, np.ndarray[Any, Any]] = {}
        self.addresses: dict[str, int] = {}
        """Of the caches, under the names of past and present."""
        self.runs = 0
        """Calls so far."""
        self._engine = engine
        self._records = not engine.records_itself
        # Decode steps have contexts of their own, so that a recorded one never meets the shapes of another call.
        self._context = self._make_long_context()
        self._spare: list[Context] = []
        """Contexts whose step was forgotten."""
        self._caches: dict[str, Memory] = {}
        self._call: _Call | None = None
        """The last one that was no decode step."""
        self._steps: OrderedDict[tuple[int, int, int], _Call] = OrderedDict()
        """Decode steps, the least recently used first."""
        self._batch: int | None = None
        self._scratch: Memory | None = None
        self._busy = False
        """The device may still work, and read what was uploaded."""

    def refusal(self, batch_size: int, width: int) -> str | None:
        return self.plan.refusal(batch_size, width)

    def _make_long_context(self) -> Context:
        """For calls that are no decode step."""
        return self._engine.create_context()

    def row_addresses(self, first: int) -> dict[str, int]:
        """Where the caches of that row and those after it lie, under the names of past and present."""
        offsets: dict[str, int] = {}
        for cache in self.plan.caches:
            offsets[cache.past] = offsets[cache.present] = first * self._row_bytes(cache)
        return {name: address + offsets[name] for name, address in self.addresses.items()}

    def settle(self) -> None:
        """Wait until the device has done everything."""
        self.device.synchronize()
        self._busy = False

    def _reset(self, batch_size: int) -> None:
        """Zeroed caches: a hidden key's 0 weight still multiplies its value, which must be finite."""
        self.settle()
        self._rope: np.ndarray[Any, Any] = np.zeros(1, np.int64)
        if batch_size == self._batch:
            for row in range(batch_size):
                self._clear_row(row, 0)
            return
        self._spare += [step.context for step in self._steps.values()]
        self._call, self._batch, self._scratch = None, batch_size, None
        self._steps.clear()
        self._caches = {}
        self.addresses = {}
        for cache in self.plan.caches:
            memory = self.device.allocate(nbytes(cache.tensor, cache.shape(batch_size)))
            self._caches[cache.present] = memory
            self.addresses |= {cache.past: memory.address, cache.present: memory.address}

    def _run_rows(self, first: int, input_ids: IntArray, lengths: IntArray) -> Logits:
        rows, width = input_ids.shape
        return self._feed(self._call_for(first, rows, width), input_ids, lengths)

    def _feed(self, call: _Call, input_ids: IntArray, lengths: IntArray) -> Logits:
        first, rows, _ = call.key
        if self._busy:
            self.settle()
        values = {
            "input_ids": input_ids,
            "write_indices": self.row_lengths[row_range(first, rows)],
            "sequence_lengths": lengths,
            PAST_ROPE: self._rope,
        }
        for name, staging in call.inputs.items():
            staging.array[:] = values[name]
        self._busy = True
        if call.graph is not None:
            call.graph.launch()
        else:
            self._work(call)
        call.runs += 1
        self.runs += 1
        if self._records and call is self._steps.get(call.key) and call.graph is None:
            # The library does some work only the first time that it meets a shape; that must not be recorded.
            self.device.synchronize()
            call.graph = self.device.record(lambda: self._work(call))
        if PRESENT_ROPE in call.outputs:
            self.settle()
            self._rope = call.outputs[PRESENT_ROPE].array.copy()
        return _DeviceLogits(self, call.outputs["logits"])

    def _call_for(self, first: int, rows: int, width: int) -> _Call:
        key = first, rows, width
        if width > 1:
            if self._call is None or self._call.key != key:
                self._call = None  # its memory is free for the next one
                self._call = self._make_call(self._context, first, rows, width)
            return self._call
        if key in self._steps:
            self._steps.move_to_end(key)
            return self._steps[key]
        if len(self._steps) == MOST_STEPS:
            self._spare.append(self._steps.popitem(last=False)[1].context)
        context = self._spare.pop() if self._spare else self._engine.create_context()
        try:
            step = self._make_call(context, first, rows, width)
        except BaseException:
            self._spare.append(context)
            raise
        self._steps[key] = step
        return step

    def _make_call(self, context: Context, first: int, rows: int, width: int) -> _Call:
        return _Call(self.device, self.plan, context, self.row_addresses(first), first, rows, width)

    def _work(self, call: _Call) -> None:
        for staging in call.inputs.values():
            self.device.upload(staging.host, staging.memory)
        call.context.enqueue()
        for name, staging in call.outputs.items():
            if name != "logits":
                self.device.download(staging.memory, staging.host)

    def _row_bytes(self, cache: CacheBuffer) -> int:
        return nbytes(cache.tensor, cache.shape(1))

    def _slots_of(self, cache: CacheBuffer, row: int, begin: int, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Where slots of a row lie, `end` being its last one where None: offset and bytes of each contiguous part."""
        *rows, slots, _ = cache.shape(1)
        heads = math.prod(rows)
        head = self._row_bytes(cache) // heads
        size = head // slots
        end = slots if end is None else end
        start = row * self._row_bytes(cache)
        if (begin, end) == (0, slots):
            yield start, head * heads
            return
        for index in range(heads):
            yield start + index * head + begin * size, (end - begin) * size

    def _clear_row(self, row: int, kept: int) -> None:
        for cache in self.plan.caches:
            for offset, size in self._slots_of(cache, row, kept):
                if size:
                    self.device.clear(self._caches[cache.present], offset, size)
        if kept == 0:
            self._forget_rope()

    def _forget_rope(self) -> None:
        self._rope = np.zeros(1, np.int64)

    def _copy_row(self, source: int, target: int, tokens: int) -> None:
        for cache in self.plan.caches:
            memory = self._caches[cache.present]
            parts = (self._slots_of(cache, row, 0, tokens) for row in (source, target))
            for (begin, size), (end, _) in zip(*parts, strict=True):
                self.device.copy(memory, begin, memory, end, size)

    def _swap_rows(self, a: int, b: int) -> None:
        if self._scratch is None:
            self._scratch = self.device.allocate(max(self._row_bytes(cache) for cache in self.plan.caches))
        for cache in self.plan.caches:
            memory, size = self._caches[cache.present], self._row_bytes(cache)
            self.device.copy(memory, a * size, self._scratch, 0, size)
            self.device.copy(memory, b * size, memory, a * size, size)
            self.device.copy(self._scratch, 0, memory, b * size, size)

    def cache(self) -> dict[str, list[FloatArray]]:
        held = {}
        for cache in self.plan.caches:
            rows = self._read(cache)
            held[cache.present] = [rows[b, :, :n].copy() for b, n in enumerate(self.row_lengths)]
        return held

    def _read(self, cache: CacheBuffer) -> FloatArray:
        """A cache as it is on the device, `[B, Hkv, L, D]`."""
        batch_size = len(self.row_lengths)
        memory = self._caches[cache.present]
        host = self.device.allocate_host(memory.nbytes)
        self.device.download(memory, host)
        self.settle()
        *_, slots, size = cache.shape(batch_size)
        raw = host.array.view(RAW_DTYPES[cache.tensor.dtype]).reshape(batch_size, -1, slots, size)
        return numbers(raw, cache.tensor)


RAW_DTYPES = {name: np.dtype("uint16" if name == "bfloat16" else name) for name in TENSORRT_DTYPES}
"""NumPy has no bfloat16: its bits."""


def numbers(raw: np.ndarray[Any, Any], tensor: EngineTensor) -> FloatArray:
    """A copy that can be computed with: bfloat16, the upper half of a float32, becomes one."""
    copied: FloatArray = raw.copy() if tensor.dtype != "bfloat16" else (raw.astype(np.uint32) << 16).view(np.float32)
    return copied
