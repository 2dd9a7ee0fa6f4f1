"""A Runner on an engine.

Caches are device buffers that are bound once as past and present: the engine writes them in place. A decode step copies
a few numbers to the device, runs and copies the logits back; these three are recorded once as a CUDA graph, and each
further step is one launch.

Axes: B rows, Q tokens of a call, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from doge_deploy.bundle.engine_record import EngineTensor
from doge_deploy.bundle.signature import PAST_ROPE, PRESENT_ROPE, Signature
from doge_deploy.devices.tensorrt_limits import TENSORRT_DTYPES
from doge_deploy.runtime.base import BundleRunner, FloatArray, IntArray
from doge_deploy.runtime.trt.device import Device, Graph, HostMemory, Memory
from doge_deploy.runtime.trt.plan import BindingPlan, nbytes


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
        self.array = self.host.array.view(_RAW_DTYPES[tensor.dtype]).reshape(shape)


class _Call:
    """Everything for calls of one shape."""

    def __init__(self, runner: TrtRunner, context: Context, batch_size: int, width: int) -> None:
        plan, device = runner.plan, runner.device
        shapes = plan.call_shapes(batch_size, width)
        self.width = width
        self.context = context
        self.inputs = {tensor.name: _Staging(device, tensor, shapes[tensor.name]) for tensor in plan.inputs}
        self.outputs = {tensor.name: _Staging(device, tensor, shapes[tensor.name]) for tensor in plan.outputs}
        addresses = {name: staging.memory.address for name, staging in {**self.inputs, **self.outputs}.items()}
        context.bind(
            plan.profile(batch_size, width), plan.input_shapes(batch_size, width), {**addresses, **runner.addresses}
        )
        self.runs = 0
        self.graph: Graph | None = None


class TrtRunner(BundleRunner):
    """An engine of TensorRT or TensorRT-RTX."""

    def __init__(
        self, engine: Engine, device: Device, plan: BindingPlan, signature: Signature, *, max_length: int, last: bool
    ) -> None:
        super().__init__(max_length=max_length, last_logits=last)
        self.device = device
        self.plan = plan
        self.signature = signature
        self.extra: dict[str, np.ndarray[Any, Any]] = {}
        self.addresses: dict[str, int] = {}
        """Of the caches, under the names of past and present."""
        self._records = not engine.records_itself
        # Decoding has a context of its own, so that a recorded decode step never meets the shapes of a prefill.
        self._prefill, self._decode = engine.create_context(), engine.create_context()
        self._caches: dict[str, Memory] = {}
        self._calls: dict[bool, _Call] = {}
        """The call that decodes (True) and the last other one (False)."""

    def refusal(self, batch_size: int, width: int) -> str | None:
        return self.plan.refusal(batch_size, width)

    def _reset(self, batch_size: int) -> None:
        """Zeroed caches: a hidden key's 0 weight still multiplies its value, which must be finite."""
        self.device.synchronize()
        self._calls = {}
        self._caches = {}
        self.addresses = {}
        self._rope: np.ndarray[Any, Any] = np.zeros(1, np.int64)
        for cache in self.plan.caches:
            memory = self.device.allocate(nbytes(cache.tensor, cache.shape(batch_size)))
            self._caches[cache.present] = memory
            self.addresses |= {cache.past: memory.address, cache.present: memory.address}

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        call = self._call_for(*input_ids.shape)
        values = {
            "input_ids": input_ids,
            "write_indices": self.row_lengths,
            "sequence_lengths": lengths,
            PAST_ROPE: self._rope,
        }
        for name, staging in call.inputs.items():
            staging.array[:] = values[name]
        if call.graph is not None:
            call.graph.launch()
        else:
            self._work(call)
        self.device.synchronize()
        call.runs += 1
        if self._records and call.width == 1 and call.graph is None:
            # The library does some work only the first time that it meets a shape; that must not be recorded.
            call.graph = self.device.record(lambda: self._work(call))
        if PRESENT_ROPE in call.outputs:
            self._rope = call.outputs[PRESENT_ROPE].array.copy()
        logits = call.outputs["logits"]
        return _numbers(logits.array, logits.tensor)

    def _call_for(self, batch_size: int, width: int) -> _Call:
        decodes = width == 1
        call = self._calls.get(decodes)
        if call is None or call.width != width:
            self._calls.pop(decodes, None)
            call = _Call(self, self._decode if decodes else self._prefill, batch_size, width)
            self._calls[decodes] = call
        return call

    def _work(self, call: _Call) -> None:
        for staging in call.inputs.values():
            self.device.upload(staging.host, staging.memory)
        call.context.enqueue()
        for staging in call.outputs.values():
            self.device.download(staging.memory, staging.host)

    def cache(self) -> dict[str, list[FloatArray]]:
        batch_size, held = len(self.row_lengths), {}
        for cache in self.plan.caches:
            memory = self._caches[cache.present]
            host = self.device.allocate_host(memory.nbytes)
            self.device.download(memory, host)
            self.device.synchronize()
            raw = host.array.view(_RAW_DTYPES[cache.tensor.dtype]).reshape(cache.shape(batch_size))
            rows = _numbers(raw, cache.tensor)
            held[cache.present] = [rows[b, :, :n].copy() for b, n in enumerate(self.row_lengths)]
        return held


_RAW_DTYPES = {name: np.dtype("uint16" if name == "bfloat16" else name) for name in TENSORRT_DTYPES}
"""NumPy has no bfloat16: its bits."""


def _numbers(raw: np.ndarray[Any, Any], tensor: EngineTensor) -> FloatArray:
    """A copy that can be computed with: bfloat16, the upper half of a float32, becomes one."""
    copied: FloatArray = raw.copy() if tensor.dtype != "bfloat16" else (raw.astype(np.uint32) << 16).view(np.float32)
    return copied
