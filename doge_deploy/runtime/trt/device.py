"""A CUDA device: memory, copies, a stream and its graphs.

Everything here is what `cuda.core` gives; the classes above the line are what a runner needs of it, and what a test
can stand in for.
Reference: https://nvidia.github.io/cuda-python/cuda-core/latest/
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from doge_deploy.errors import MissingDependencyError

Bytes = npt.NDArray[np.uint8]


class Memory(ABC):
    """Device memory. It lives as long as the object."""

    address: int
    nbytes: int


class HostMemory(ABC):
    """Memory of the processor that the device can copy from and to while other things run."""

    array: Bytes
    """A view of it, `[nbytes]`."""


class Graph(ABC):
    """Recorded work."""

    @abstractmethod
    def launch(self) -> None:
        """Put the work into the device's stream again, on the same addresses."""


class Device(ABC):
    """One device with one stream. Work is done in the order in which it is asked for."""

    name: str
    compute_capability: str
    stream: int
    """The stream's handle, as the vendor's library takes it."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Memory:
        """Device memory full of zeros.

        Raises:
            MissingDependencyError: there is not so much.
        """

    @abstractmethod
    def allocate_host(self, nbytes: int) -> HostMemory:
        """Page-locked memory of the processor."""

    @abstractmethod
    def upload(self, source: HostMemory, target: Memory) -> None:
        """Copy all of it to the device. It must not be changed before `synchronize`."""

    @abstractmethod
    def download(self, source: Memory, target: HostMemory) -> None:
        """Copy all of it from the device. It is there after `synchronize`."""

    @abstractmethod
    def copy(self, source: Memory, source_begin: int, target: Memory, target_begin: int, nbytes: int) -> None:
        """Copy `nbytes` from byte `source_begin` to byte `target_begin`; the two parts do not overlap."""

    @abstractmethod
    def clear(self, memory: Memory, begin: int, nbytes: int) -> None:
        """Zeros in `nbytes` from byte `begin` on."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work is done."""

    @abstractmethod
    def record(self, work: Callable[[], None]) -> Graph:
        """Record what `work` asks of the stream instead of doing it."""


class _CudaMemory(Memory):
    def __init__(self, buffer: Any, nbytes: int) -> None:
        self.buffer = buffer
        self.address = int(buffer.handle)
        self.nbytes = nbytes


class _CudaHostMemory(HostMemory):
    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.array = np.from_dlpack(buffer).view(np.uint8)


class _CudaGraph(Graph):
    def __init__(self, graph: Any, stream: Any) -> None:
        self._graph, self._stream = graph, stream

    def launch(self) -> None:
        self._graph.launch(self._stream)


class CudaDevice(Device):
    """A device of `cuda.core`."""

    def __init__(self, core: Any, index: int = 0) -> None:
        self._core = core
        self._device = core.Device(index)
        self._device.set_current()
        self._stream = self._device.create_stream()
        self._pinned = core.LegacyPinnedMemoryResource()
        self.name = str(self._device.name)
        major, minor = self._device.compute_capability
        self.compute_capability = f"{major}.{minor}"
        self.stream = int(self._stream.handle)

    def allocate(self, nbytes: int) -> Memory:
        try:
            buffer = self._device.allocate(nbytes, stream=self._stream)
            buffer.fill(0, stream=self._stream)
        except Exception as error:  # cuda.core's errors have no common base of their own
            raise MissingDependencyError(
                f"{self.name} cannot give {nbytes / 1e6:.1f} MB of memory: {error}; try a smaller batch or --max-length"
            ) from error
        return _CudaMemory(buffer, nbytes)

    def allocate_host(self, nbytes: int) -> HostMemory:
        return _CudaHostMemory(self._pinned.allocate(nbytes))

    def upload(self, source: HostMemory, target: Memory) -> None:
        assert isinstance(source, _CudaHostMemory) and isinstance(target, _CudaMemory)
        source.buffer.copy_to(target.buffer, stream=self._stream)

    def download(self, source: Memory, target: HostMemory) -> None:
        assert isinstance(source, _CudaMemory) and isinstance(target, _CudaHostMemory)
        source.buffer.copy_to(target.buffer, stream=self._stream)

    def copy(self, source: Memory, source_begin: int, target: Memory, target_begin: int, nbytes: int) -> None:
        part = self._part(target, target_begin, nbytes)
        self._part(source, source_begin, nbytes).copy_to(part, stream=self._stream)

    def clear(self, memory: Memory, begin: int, nbytes: int) -> None:
        self._part(memory, begin, nbytes).fill(0, stream=self._stream)

    def _part(self, memory: Memory, begin: int, nbytes: int) -> Any:
        """A buffer on a part of another one's memory, which it keeps alive."""
        assert isinstance(memory, _CudaMemory)
        return self._core.Buffer.from_handle(memory.address + begin, nbytes, owner=memory.buffer)

    def synchronize(self) -> None:
        self._stream.sync()

    def record(self, work: Callable[[], None]) -> Graph:
        builder = self._stream.create_graph_builder()
        builder.begin_building("thread_local")
        try:
            work()
        finally:
            builder.end_building()
        return _CudaGraph(builder.complete(), self._stream)


def open_device(extra: str, index: int = 0) -> CudaDevice:
    """The CUDA device of that index.

    Args:
        extra: the extra of our package that brings `cuda.core`, for the message.
        index: as CUDA counts.

    Raises:
        MissingDependencyError: `cuda.core`, the driver or the device is missing.
    """
    try:
        import cuda.core as core
    except ImportError as error:
        raise MissingDependencyError(
            f"cuda.core cannot be loaded ({error}): pip install 'doge-deploy[{extra}]'"
        ) from error
    try:
        return CudaDevice(core, index)
    except Exception as error:  # no driver, no device, a driver that is too old: each in words of its own
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise MissingDependencyError(
            f"no CUDA device: {reason}; it takes an NVIDIA GPU with its driver, see `doge-deploy doctor`"
        ) from error
