"""Memory of the device that ONNX Runtime computes on, through its Python interface alone.

With the device `cpu` the same code does the same in the processor's memory, which is how tests run it.

Reference: https://onnxruntime.ai/docs/api/python/api_summary.html (OrtValue, IOBinding).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnxruntime


class DeviceArray:
    """An array on the device, `[*shape]`; its address never changes."""

    def __init__(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        import onnxruntime

        self.shape, self.dtype = shape, np.dtype(dtype)
        self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(shape), self.dtype.type, memory.device, memory.device_id
        )
        self.address: int = self.value.data_ptr()
        self.write(np.zeros(shape, dtype))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def write(self, array: npt.NDArray[Any]) -> None:
        """Copy an array of the processor's here; it must have this shape and dtype."""
        assert array.shape == self.shape and array.dtype == self.dtype
        self.value.update_inplace(np.ascontiguousarray(array))

    def read(self) -> npt.NDArray[Any]:
        """A copy in the processor's memory."""
        array: npt.NDArray[Any] = self.value.numpy()
        return array.copy()


class DeviceMemory:
    """Arrays of one device, and copies between any two addresses of it.

    ONNX Runtime has no call for the latter. A session of one Identity, whose input and output are bound to addresses,
    does it on the device.

    Args:
        device: `cuda` or `cpu`.
        device_id: the number of the device.
        open_session: opens a session on that device from a serialized graph.
    """

    def __init__(
        self, device: str, device_id: int, open_session: Callable[[bytes], onnxruntime.InferenceSession]
    ) -> None:
        self.device, self.device_id = device, device_id
        self._open_session = open_session
        self._copier: onnxruntime.InferenceSession | None = None

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """A new array of zeros."""
        return DeviceArray(self, shape, dtype)

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Copy bytes between two addresses; the ranges must not overlap. It is done when this returns."""
        if not nbytes:
            return
        if self._copier is None:
            self._copier = self._open_session(_identity())
        binding: Any = self._copier.io_binding()
        binding.bind_input("x", self.device, self.device_id, np.uint8, [nbytes], source)
        binding.bind_output("y", self.device, self.device_id, np.uint8, [nbytes], target)
        self._copier.run_with_iobinding(binding)


def _identity() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.UINT8, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "copy", [x], [y])
    opsets = [helper.make_opsetid("", 24)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return data
