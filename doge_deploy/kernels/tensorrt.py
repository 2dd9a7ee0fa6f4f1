"""Make plugins known to TensorRT: its `tensorrt.plugin` gets a description and an ahead-of-time implementation of each.

Everything comes from the specs: shapes and launch grids are their expressions, put into TensorRT's own symbols, so
that batch, new tokens and cached keys may stay open. A kernel is compiled when TensorRT asks for it, for the sizes
that are fixed in the engine, and handed over as PTX. The engine holds it; neither Python nor Triton is needed to run
it.

Reference: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/tensorrt.plugin/
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from doge_deploy.devices.tensorrt_limits import TENSORRT_DTYPES
from doge_deploy.errors import MissingDependencyError, UnsupportedModelError
from doge_deploy.kernels.compile import Compiled, compile_one
from doge_deploy.kernels.expressions import INT_OPERATIONS, Expr, Operand, evaluate
from doge_deploy.kernels.spec import Binding, PluginSpec, TensorSpec

Compiler = Callable[[Binding, int], Compiled]
"""(node, compute capability such as 87) -> PTX and its record."""

_PYTHON_TYPES: Mapping[str, type] = {"int": int, "float": float, "str": str}

_AUTOTUNE_DTYPES = {**TENSORRT_DTYPES, "float32": "FP32", "float16": "FP16"}
"""Names in the text form of `AutoTuneCombination`."""


def register(specs: Iterable[PluginSpec], arch: int, compiler: Compiler = compile_one) -> list[str]:
    """Register plugins in this process; those that are there already stay.

    Args:
        specs: the plugins.
        arch: compute capability of the device that the engine is for, such as 87.
        compiler: makes the PTX of one kernel.

    Returns:
        Ids of the plugins that were added.

    Raises:
        MissingDependencyError: TensorRT is not installed, or this version has no ahead-of-time Python plugins.
    """
    trtp = _import_plugin_module()
    op = trtp.op
    added = []
    for spec in specs:
        if hasattr(op, spec.namespace) and hasattr(getattr(op, spec.namespace), spec.name):
            continue
        _register_one(trtp, spec, arch, compiler)
        added.append(spec.id)
    return added


def _import_plugin_module() -> Any:
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise MissingDependencyError(
            f"TensorRT is not installed ({error}): pip install 'doge-deploy[trt]', or use the one of JetPack"
        ) from None
    trtp: Any = None
    with contextlib.suppress(ImportError):
        trtp = importlib.import_module("tensorrt.plugin")
    if not hasattr(trtp, "aot_impl"):
        raise MissingDependencyError(
            f"TensorRT {trt.__version__} has no ahead-of-time Python plugins (tensorrt.plugin.aot_impl)"
        )
    return trtp


def _register_one(trtp: ModuleType, spec: PluginSpec, arch: int, compiler: Compiler) -> None:
    """`register`, `autotune` and `aot_impl` for one plugin.

    `tensorrt.plugin` reads the parameters of each function: one per input by its name, one per attribute with its type,
    then `outputs` and `tactic`.
    """
    plugin = _Plugin(trtp, spec, arch, compiler)
    described = [(tensor.name, trtp.TensorDesc) for tensor in spec.inputs]
    described += [(attribute.name, _PYTHON_TYPES[attribute.type]) for attribute in spec.attributes]
    outputs = ("outputs", tuple[(trtp.TensorDesc,) * len(spec.outputs)])  # type: ignore[misc]
    launch = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]  # type: ignore[name-defined]
    trtp.register(spec.id)(_with_signature(plugin.describe, described, outputs[1]))
    trtp.autotune(spec.id)(
        _with_signature(plugin.combinations, [*described, outputs], list[trtp.AutoTuneCombination])  # type: ignore[name-defined]
    )
    trtp.aot_impl(spec.id)(_with_signature(plugin.implement, [*described, outputs, ("tactic", int)], launch))


def _with_signature(
    function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], returns: Any
) -> Callable[..., Any]:
    """`function` as seen by `inspect.signature` with these parameters."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=returns,
    )
    return wrapper


class _Plugin:
    """The three answers that TensorRT wants of a plugin."""

    def __init__(self, trtp: Any, spec: PluginSpec, arch: int, compiler: Compiler) -> None:
        self.trtp = trtp
        self.spec = spec
        self.arch = arch
        self.compiler = compiler
        self.operations = {name: functools.partial(_apply, trtp, name) for name in INT_OPERATIONS}
        trt = importlib.import_module("tensorrt")
        self.dtypes = {name: getattr(trt.DataType, member) for name, member in TENSORRT_DTYPES.items()}

    def describe(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Shapes and dtypes of the outputs, in TensorRT's symbols."""
        tensors, attributes = self._split(args, kwargs)
        values = self._symbols(tensors, attributes)
        of_model = next((t.dtype for t, s in zip(tensors, self.spec.inputs, strict=True) if s.dtype == "T"), None)
        outputs = []
        for output in self.spec.outputs:
            sizes = tuple(self._shape_expr(size, values) for size in output.shape)
            dtype = of_model if output.dtype == "T" else self.dtypes[output.dtype]
            outputs.append(self.trtp.from_shape_expr(sizes, dtype))
        return tuple(outputs)

    def combinations(self, *args: Any) -> list[Any]:
        """Dtypes that the tensors may have together; all of them lie in memory as they are (linear)."""
        tensors: tuple[TensorSpec, ...] = (*self.spec.inputs, *self.spec.outputs)
        model = "|".join(_AUTOTUNE_DTYPES[name] for name in self.spec.dtypes)
        types = [model if tensor.dtype == "T" else _AUTOTUNE_DTYPES[tensor.dtype] for tensor in tensors]
        return [self.trtp.AutoTuneCombination(", ".join(types), "LINEAR")]

    def implement(self, *args: Any, **kwargs: Any) -> tuple[str, str, Any, Any]:
        """Name and PTX of the kernel, its launch, and the scalars between inputs and outputs."""
        count = len(self.spec.inputs) + len(self.spec.attributes)
        tensors, attributes = self._split(
            args[:count], {k: v for k, v in kwargs.items() if k not in ("outputs", "tactic")}
        )
        binding = Binding(self.spec, self._numbers(tensors, attributes), self._dtype(tensors))
        tile = binding.tile(self.arch)
        compiled = self.compiler(binding, self.arch)
        values = {**self._symbols(tensors, attributes), **tile.constants}
        launch = self.trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = (self._symbol(size, values) for size in self.spec.grid)
        launch.block_x = compiled.record.threads
        launch.shared_mem = compiled.record.shared_memory_bytes
        scalars = self.trtp.SymIntExprs(len(self.spec.scalars))
        for index, scalar in enumerate(self.spec.scalars.values()):
            scalars[index] = self.trtp.SymInt32(self._symbol(scalar, values))
        return compiled.record.entry, compiled.ptx, launch, scalars

    def _split(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Descriptors of the inputs, and attributes by name: TensorRT gives those by name here and in order there."""
        count = len(self.spec.inputs)
        names = [attribute.name for attribute in self.spec.attributes]
        given = {**dict(zip(names, args[count:], strict=False)), **kwargs}
        # a string may come with the zero that ends it in C
        return list(args[:count]), {
            name: value.rstrip("\0") if isinstance(value, str) else value for name, value in given.items()
        }

    def _symbols(self, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Every dimension as TensorRT's expression, every attribute as it is."""
        values: dict[str, Any] = dict(attributes)
        for tensor, spec in zip(tensors, self.spec.inputs, strict=True):
            for axis, size in enumerate(spec.shape):
                if isinstance(size, Expr) and size.operation == "symbol":
                    values.setdefault(size.operands[0], tensor.shape_expr[axis])
        return values

    def _numbers(self, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes that are compile-time constants of the kernel, and the attributes.

        Raises:
            UnsupportedModelError: one of them is open in this engine.
        """
        values: dict[str, Any] = dict(attributes)
        for tensor, spec in zip(tensors, self.spec.inputs, strict=True):
            for axis, size in enumerate(spec.shape):
                if isinstance(size, Expr) and size.operation == "symbol" and size.operands[0] in self.spec.static:
                    number = int(tensor.shape[axis])
                    if number < 0:
                        raise UnsupportedModelError(
                            f"{self.spec.id}: {size} (axis {axis} of {spec.name}) must be a number when the engine is "
                            f"built; it is open"
                        )
                    values[size.operands[0]] = number
        return values

    def _dtype(self, tensors: Sequence[Any]) -> str:
        """Of T; float32 where the plugin has no tensor of that kind."""
        names = {dtype: name for name, dtype in self.dtypes.items()}
        for tensor, spec in zip(tensors, self.spec.inputs, strict=True):
            if spec.dtype == "T":
                return names[tensor.dtype]
        return "float32"

    def _symbol(self, size: Operand, values: Mapping[str, Any]) -> Any:
        return evaluate(size, values, self.operations)

    def _shape_expr(self, size: Operand, values: Mapping[str, Any]) -> Any:
        symbol = self._symbol(size, values)
        return symbol if isinstance(symbol, (int, self.trtp.ShapeExpr)) else self.trtp.ShapeExpr(symbol)


def _apply(trtp: Any, name: str, left: Any, right: Any) -> Any:
    """One operation of `expressions` on TensorRT's symbols and numbers; two numbers stay a number."""
    if isinstance(left, int) and isinstance(right, int):
        return INT_OPERATIONS[name](left, right)
    left = trtp.ShapeExpr(left) if isinstance(left, int) else left
    if name in ("cdiv", "min", "max"):
        return getattr(trtp, name)(left, right)
    return INT_OPERATIONS[name](left, right)
