"""NVIDIA's `tensorrt.plugin`, driven without a GPU and without TensorRT.

The Python code and its C++ bindings (package `tensorrt-cu13-bindings`) are NVIDIA's own, unchanged. The eleven C
functions that the bindings need come from TensorRT-RTX, whose libraries can be installed anywhere; the plugin library
of TensorRT is an empty one. What would be the builder is here: dimensions as expressions that remember themselves, so
that shapes and launches can be asked for with open sizes and evaluated later.

It checks what plugins say to NVIDIA's code. It cannot check a build.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from doge_deploy.kernels.expressions import INT_OPERATIONS
from doge_deploy.kernels.spec import PluginSpec

PACKAGES = ("tensorrt_bindings", "tensorrt_rtx_libs")


def missing() -> str:
    """What is not installed, or an empty string."""
    if os.environ.get("DOGE_TENSORRT_CONTRACT") != "1":
        return "puts a double in the place of TensorRT, so it has a process of its own: nox -s tensorrt-contract"
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(absent)}" if absent else ""


_SHIMS = {
    "libnvinfer.so.11": ("", "libtensorrt_rtx.so.1"),
    "libnvonnxparser.so.11": ("", "libtensorrt_onnxparser_rtx.so.1"),
    "libnvinfer_plugin.so.11": ("int initLibNvInferPlugins(void* logger, char const* name) { return 1; }", None),
}
"""Libraries that the bindings ask for: C text, and the library that they pass on to."""


def load(folder: Path) -> Any:
    """Import `tensorrt` and `tensorrt.plugin`; libraries are made in `folder`."""
    if "tensorrt" in sys.modules:
        return sys.modules["tensorrt"]
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None and spec.submodule_search_locations
    vendor = Path(next(iter(spec.submodule_search_locations)))
    for name, (text, target) in _SHIMS.items():
        source = folder / f"{name}.c"
        source.write_text(text)
        link = [f"-L{vendor}", f"-l:{target}", f"-Wl,-rpath,{vendor}", "-Wl,--no-as-needed"] if target else []
        # --no-as-needed must stand before the library that it keeps
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source), *link[::-1]]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    trt = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = trt
    # what only the builder can make; `tensorrt.plugin` looks them up when it is imported and when it runs
    trt.IDimensionExpr, trt.DimsExprs, trt.ISymExpr = Dimension, Dimensions, SymbolicArgument  # type: ignore[attr-defined]
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    return trt


class Dimension:
    """In place of IDimensionExpr: a number, a name, or an operation."""

    def __init__(self, evaluate: Callable[[Mapping[str, int]], int], constant: bool) -> None:
        self.evaluate = evaluate
        self.constant = constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.evaluate({})

    def is_size_tensor(self) -> bool:
        return False


class Dimensions(list[Any]):
    """In place of DimsExprs."""

    def __init__(self, length: int = 0) -> None:
        super().__init__([None] * length)


class SymbolicArgument:
    """In place of ISymExpr."""


_OPERATIONS = {
    "SUM": "add",
    "SUB": "sub",
    "PROD": "mul",
    "FLOOR_DIV": "floordiv",
    "CEIL_DIV": "cdiv",
    "MIN": "min",
    "MAX": "max",
}


class ExpressionBuilder:
    """In place of IExprBuilder."""

    def constant(self, value: int) -> Dimension:
        return Dimension(lambda sizes: value, constant=True)

    def operation(self, operation: Any, left: Dimension, right: Dimension) -> Dimension:
        apply = INT_OPERATIONS[_OPERATIONS[operation.name]]
        return Dimension(
            lambda sizes: apply(left.evaluate(sizes), right.evaluate(sizes)), left.constant and right.constant
        )


def dimension(size: int | str) -> Dimension:
    """A number that is fixed in the engine, or the name of one that is open."""
    if isinstance(size, int):
        return Dimension(lambda sizes: size, constant=True)
    return Dimension(lambda sizes: sizes[size], constant=False)


DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "bool": "BOOL",
}


@dataclass
class Launch:
    """What an engine would do for one node at given sizes."""

    entry: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory_bytes: int
    scalars: list[int]
    output_shapes: list[tuple[int, ...]]


class Node:
    """A plugin node in a network under construction: asks NVIDIA's code in the order in which the builder does."""

    def __init__(self, trt: Any, spec: PluginSpec, attributes: Mapping[str, Any], dtype: str, shapes: Any) -> None:
        self.trt = trt
        self.spec = spec
        self.shapes = shapes
        creator = trt.get_plugin_registry().get_creator(spec.name, spec.version, spec.namespace)
        assert creator is not None, f"{spec.id} is not in TensorRT's registry"
        fields = trt.PluginFieldCollection([_field(trt, name, value) for name, value in attributes.items()])
        request = trt.QuickPluginCreationRequest.STRICT_AOT
        self.plugin = creator.create_plugin(spec.name, spec.namespace, fields, trt.TensorRTPhase.BUILD, request)
        self.input_dtypes = [self._dtype(tensor.dtype, dtype) for tensor in spec.inputs]
        self.output_dtypes = self.plugin.get_output_data_types(self.input_dtypes, [len(shape) for shape in shapes])
        self.builder = ExpressionBuilder()
        inputs = [_dimensions(shape) for shape in shapes]
        self.output_expressions = self.plugin.get_output_shapes(inputs, [], self.builder)

    def _dtype(self, name: str, model: str) -> Any:
        return getattr(self.trt.DataType, DTYPES[model if name == "T" else name])

    def output_shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        return [tuple(size.evaluate(sizes) for size in shape) for shape in self.output_expressions]

    def combinations(self) -> list[list[str]]:
        """Names of the dtypes that inputs and outputs may have together."""
        tensors = self._descriptors()
        found = self.plugin.get_supported_format_combinations(tensors, len(self.shapes))
        assert all(desc.format == self.trt.TensorFormat.LINEAR for desc in found)
        width = len(tensors)
        return [[desc.type.name for desc in found[i : i + width]] for i in range(0, len(found), width)]

    def _descriptors(self) -> list[Any]:
        """Of inputs and outputs, as a builder has them: -1 where a size is open."""
        result = []
        outputs = [
            [size.evaluate({}) if size.constant else "open" for size in shape] for shape in self.output_expressions
        ]
        shapes = [*self.shapes, *outputs]
        for shape, dtype in zip(shapes, [*self.input_dtypes, *self.output_dtypes], strict=True):
            descriptor = self.trt.DynamicPluginTensorDesc()
            descriptor.desc.dims = self.trt.Dims([size if isinstance(size, int) else -1 for size in shape])
            descriptor.desc.type, descriptor.desc.format = dtype, self.trt.TensorFormat.LINEAR
            result.append(descriptor)
        return result

    def prepare(self) -> Callable[[Mapping[str, int]], Launch]:
        """Choose the dtypes of this network, get the kernel; what is returned gives the launch at given sizes."""
        self.combinations()
        tensors = self._descriptors()
        count = len(self.shapes)
        self.plugin.configure_plugin(tensors[:count], tensors[count:])
        assert self.plugin.get_valid_tactics() == []
        self.plugin.set_tactic(0)
        launch, scalars = SimpleNamespace(), _Scalars()
        inputs = [_dimensions(shape) for shape in self.shapes]
        self.plugin.get_launch_params(inputs, tensors, count, launch, scalars, self.builder)
        descriptions = [tensor.desc for tensor in tensors]
        entry, ptx = self.plugin.get_kernel(descriptions[:count], descriptions[count:])

        def at(sizes: Mapping[str, int]) -> Launch:
            def number(argument: Any) -> int:
                assert argument.dtype == self.trt.PluginArgDataType.INT32
                value: int = argument.expr.evaluate(sizes)
                return value

            def axes(name: str) -> tuple[int, int, int]:
                x, y, z = (number(getattr(launch, f"{name}_{axis}")) for axis in "xyz")
                return x, y, z

            return Launch(
                entry,
                ptx.decode(),
                axes("grid"),
                axes("block"),
                number(launch.shared_mem),
                [number(scalars[index]) for index in range(scalars.nbSymExprs)],
                self.output_shapes(sizes),
            )

        return at


class _Scalars(dict[int, Any]):
    """In place of ISymExprs."""

    nbSymExprs = 0


def _dimensions(shape: Sequence[int | str]) -> Dimensions:
    result = Dimensions()
    result.extend(map(dimension, shape))
    return result


def _field(trt: Any, name: str, value: Any) -> Any:
    """An attribute as TensorRT's ONNX parser hands it over."""
    import numpy as np

    if isinstance(value, str):
        return trt.PluginField(name, value.encode(), trt.PluginFieldType.CHAR)
    if isinstance(value, float):
        return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
    return trt.PluginField(name, np.array([value], np.int64), trt.PluginFieldType.INT64)
