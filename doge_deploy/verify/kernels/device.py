"""A CUDA device on which recorded kernels run: cuda.core, and one call of the driver that it has no name for.

Reference: https://nvidia.github.io/cuda-python/cuda-core/latest/ (ObjectCode.from_ptx, launch, Event);
https://docs.nvidia.com/cuda/cuda-driver-api (cuKernelSetAttribute).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from doge_deploy.errors import MissingDependencyError
from doge_deploy.verify.compare import Array
from doge_deploy.verify.kernels.schema import Launch

FREE_SHARED_BYTES = 48 * 1024
"""Shared memory that a program may have without asking."""


class DeviceFaultError(Exception):
    """A kernel did what no device lets it do; nothing more can be run in this process."""


class KernelDevice(ABC):
    """What the judge needs of a device."""

    name: str
    arch: int
    """Compute capability: 90."""

    @abstractmethod
    def upload(self, array: Array) -> Any:
        """Its bytes in fresh device memory.

        Raises:
            DeviceFaultError: a kernel before it went wrong, or there is not so much.
        """

    @abstractmethod
    def download(self, memory: Any, like: Array) -> Array:
        """Numbers of the type and shape of `like`, when all work so far is done.

        Raises:
            DeviceFaultError: a kernel before it went wrong.
        """

    @abstractmethod
    def load(self, launch: Launch, ptx: bytes) -> Any:
        """The kernel of a launch, from its text.

        Raises:
            MissingDependencyError: the driver refuses it.
        """

    @abstractmethod
    def launch(self, kernel: Any, launch: Launch, arguments: Sequence[Any]) -> None:
        """Start it; `arguments` are device memory, and NumPy's int32 for numbers.

        Raises:
            DeviceFaultError: it cannot be started.
        """

    @abstractmethod
    def seconds(self, kernel: Any, launch: Launch, arguments: Sequence[Any], times: int) -> float:
        """Time of one of `times` launches, one after another."""

    @abstractmethod
    def bytes_per_second(self) -> float:
        """What the memory moves in a large copy, read and written bytes together."""


class CudaKernels(KernelDevice):
    """A device of cuda.core.

    Args:
        core: the module `cuda.core`.
        driver: the module `cuda.bindings.driver`, which cuda.core stands on.
        index: of the device, as CUDA counts.
    """

    def __init__(self, core: Any, driver: Any, index: int = 0) -> None:
        self._core, self._driver = core, driver
        self._device = core.Device(index)
        self._device.set_current()
        self._stream = self._device.create_stream()
        self._pinned = core.LegacyPinnedMemoryResource()
        self.name = str(self._device.name)
        major, minor = self._device.compute_capability
        self.arch = 10 * int(major) + int(minor)

    def upload(self, array: Array) -> Any:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with _faults():
            host = self._pinned.allocate(max(data.nbytes, 1))
            np.from_dlpack(host).view(np.uint8)[: data.nbytes] = data
            memory = self._device.allocate(max(data.nbytes, 1), stream=self._stream)
            host.copy_to(memory, stream=self._stream)
            self._stream.sync()  # the page-locked memory is given back
        return memory

    def download(self, memory: Any, like: Array) -> Array:
        with _faults():
            host = self._pinned.allocate(max(like.nbytes, 1))
            memory.copy_to(host, stream=self._stream)
            self._stream.sync()
        data = np.from_dlpack(host).view(np.uint8)[: like.nbytes].copy()
        result: Array = data.view(like.dtype).reshape(like.shape)
        return result

    def load(self, launch: Launch, ptx: bytes) -> Any:
        try:
            kernel = self._core.ObjectCode.from_ptx(ptx, name=launch.plugin).get_kernel(launch.entry)
            if launch.shared_memory_bytes > FREE_SHARED_BYTES:
                self._allow_shared_memory(kernel, launch.shared_memory_bytes)
        except Exception as error:  # cuda.core's errors have no common base of their own
            reason = " ".join(str(error).split())
            raise MissingDependencyError(f"{self.name} does not load {launch.plugin}: {reason}") from error
        return kernel

    def _allow_shared_memory(self, kernel: Any, nbytes: int) -> None:
        """cuda.core reads this attribute of a kernel and cannot set it."""
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = self._driver.cuKernelSetAttribute(attribute, nbytes, kernel.handle, self._device.device_id)
        if int(status) != 0:
            raise RuntimeError(f"{nbytes} bytes of shared memory: {status!r}")

    def launch(self, kernel: Any, launch: Launch, arguments: Sequence[Any]) -> None:
        with _faults():
            self._core.launch(self._stream, self._config(launch), kernel, *arguments)

    def _config(self, launch: Launch) -> Any:
        return self._core.LaunchConfig(
            grid=tuple(launch.grid), block=(launch.threads, 1, 1), shmem_size=launch.shared_memory_bytes
        )

    def seconds(self, kernel: Any, launch: Launch, arguments: Sequence[Any], times: int) -> float:
        config = self._config(launch)
        self._core.launch(self._stream, config, kernel, *arguments)
        begin = self._event()
        for _ in range(times):
            self._core.launch(self._stream, config, kernel, *arguments)
        return self._since(begin) / times

    def _event(self) -> Any:
        return self._stream.record(options=self._core.EventOptions(timing_enabled=True))

    def _since(self, begin: Any) -> float:
        end = self._event()
        end.sync()
        return float(end - begin) / 1e3  # cuda.core gives milliseconds

    def bytes_per_second(self) -> float:
        size, times = 256 * 2**20, 8
        source, target = (self._device.allocate(size, stream=self._stream) for _ in range(2))
        source.copy_to(target, stream=self._stream)
        begin = self._event()
        for _ in range(times):
            source.copy_to(target, stream=self._stream)
        return 2 * size * times / self._since(begin)


@contextmanager
def _faults() -> Iterator[None]:
    """Errors of cuda.core, which have no common base of their own, as what they are here."""
    try:
        yield
    except Exception as error:
        raise DeviceFaultError(" ".join(str(error).split()) or type(error).__name__) from error


def open_kernel_device(index: int = 0) -> CudaKernels:
    """The CUDA device of that index.

    Raises:
        MissingDependencyError: cuda.core, the driver or the device is missing.
    """
    try:
        import cuda.core as core
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError(
            f"cuda.core cannot be loaded ({error}): pip install cuda-core cuda-bindings"
        ) from error
    try:
        return CudaKernels(core, driver, index)
    except Exception as error:  # no driver, no device, a driver that is too old: each in words of its own
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise MissingDependencyError(f"no CUDA device: {reason}; it takes an NVIDIA GPU with its driver") from error
