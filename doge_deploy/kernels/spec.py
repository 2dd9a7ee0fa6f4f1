"""The contract of a plugin: what a kernel takes, gives and needs, said without Triton, TensorRT and PyTorch.

One `PluginSpec` is one graph node and one kernel launch, because a plugin that TensorRT embeds as PTX is one kernel. An
operator of several kernels is an `OperatorPlugin`: its specs, and how to chain them.

A kernel's parameters stand in this order: pointers to the inputs (`x_ptr` for an input `x`), the scalars (int32),
pointers to the outputs, then compile-time constants by name. Tensors are contiguous.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from doge_deploy.dtypes import FLOATS
from doge_deploy.errors import UsageError
from doge_deploy.kernels.expressions import Expr, Operand, evaluate
from doge_deploy.kernels.parameters import parameter_of_tensor

DType = Literal["T", "float32", "float16", "bfloat16", "int64", "int32", "int8", "bool"]
AttributeType = Literal["int", "float", "str"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output."""

    name: str
    dtype: DType
    """`T` is the one float dtype that a node's tensors share."""
    shape: tuple[Operand, ...]
    """Of an input: a symbol (binds the dimension), a number, or an expression (checked once all symbols are bound)."""
    doc: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Attribute:
    """A value that is fixed when the graph is written; it is a compile-time constant of the kernel."""

    name: str
    type: AttributeType
    doc: str
    legal: tuple[Any, ...] = ()
    """All legal values; empty where the limits say it."""


@dataclass(frozen=True)
class Limit:
    """A condition on dimensions and attributes under which the kernel is right."""

    holds: Callable[[Mapping[str, Any]], bool]
    text: str
    """What is legal, as it stands in a message: `D a multiple of 8, at most 256`."""


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut for one device and one node."""

    constants: Mapping[str, int]
    """Compile-time block sizes, names as in the kernel."""
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    """Per thread, as the PTX says. None lets ptxas choose, which may spill a little to run more programs at once."""


Tiler = Callable[[int, Mapping[str, Any], str], Tile]
"""(compute capability such as 87, dimensions and attributes, dtype of T) -> tile."""


@dataclass(frozen=True)
class Binding:
    """A spec on one node: every symbol has its value."""

    spec: PluginSpec
    values: Mapping[str, Any]
    """Dimensions and attributes by name."""
    dtype: str
    """Of T."""

    def dtype_of(self, tensor: TensorSpec) -> str:
        """The tensor's dtype, T resolved."""
        return self.dtype if tensor.dtype == "T" else tensor.dtype

    @property
    def output_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(evaluate(size, self.values) for size in output.shape) for output in self.spec.outputs]

    @property
    def scalars(self) -> list[int]:
        """The int32 arguments between inputs and outputs."""
        return [evaluate(value, self.values) for value in self.spec.scalars.values()]

    def tile(self, arch: int) -> Tile:
        return self.spec.tiler(arch, self.values, self.dtype)

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Every compile-time constant of the kernel."""
        return {name: evaluate(value, self.values) for name, value in self.spec.constants.items()} | dict(
            tile.constants
        )

    def grid(self, tile: Tile) -> tuple[int, int, int]:
        """Programs along each axis; TensorRT evaluates the same expressions of `spec.grid` symbolically."""
        x, y, z = (evaluate(size, {**self.values, **tile.constants}) for size in self.spec.grid)
        return x, y, z


@dataclass(frozen=True)
class PluginSpec:
    """One kernel as a graph node."""

    name: str
    doc: str
    """The formula in one line."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[Attribute, ...]
    kernel: str
    """`module:function` of the Triton kernel; importing it needs Triton."""
    constants: Mapping[str, Operand]
    """Compile-time parameters of the kernel that do not depend on the device, from static dimensions and attributes."""
    grid: tuple[Operand, Operand, Operand]
    """Programs along x, y, z, from dimensions, attributes and constants of the tile; never 0 for non-empty tensors."""
    tiler: Tiler
    scalars: Mapping[str, Operand] = field(default_factory=dict)
    """int32 parameters of the kernel between inputs and outputs."""
    static: tuple[str, ...] = ()
    """Dimensions that are compile-time constants; all others are dynamic."""
    dtypes: tuple[str, ...] = FLOATS
    """Legal dtypes of T."""
    limits: tuple[Limit, ...] = ()
    namespace: str = "doge"
    version: str = "1"

    @property
    def id(self) -> str:
        """As TensorRT names it: `doge::DynamicMaskSelect`."""
        return f"{self.namespace}::{self.name}"

    @property
    def parameters(self) -> list[str]:
        """Names of the kernel's parameters before its compile-time constants, in order."""
        inputs, outputs = ([parameter_of_tensor(one.name) for one in many] for many in (self.inputs, self.outputs))
        return [*inputs, *self.scalars, *outputs]

    def load_kernel(self) -> Any:
        """The Triton kernel; imports Triton."""
        module, _, name = self.kernel.partition(":")
        return getattr(importlib.import_module(module), name)

    def bind(self, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any], dtype: str) -> Binding:
        """Give every symbol its value, and check shapes, attributes, dtype and limits.

        Args:
            shapes: of the inputs, in order.
            attributes: every attribute.
            dtype: of T.

        Raises:
            UsageError: the first thing that does not fit, and what would.
        """
        problems = self.problems(shapes, attributes, dtype)
        if problems:
            raise UsageError(f"{self.id}: {problems[0]}")
        return Binding(self, self._values(shapes, attributes)[0], dtype)

    def problems(self, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any], dtype: str) -> list[str]:
        """Everything about a node that this spec does not take; empty if it fits."""
        if len(shapes) != len(self.inputs):
            return [f"{len(shapes)} inputs; takes {len(self.inputs)}: {', '.join(map(str, self.inputs))}"]
        problems = self.attribute_problems(attributes)
        if dtype not in self.dtypes:
            problems.append(f"T is {dtype}; takes {', '.join(self.dtypes)}")
        values, shape_problems = self._values(shapes, attributes)
        problems += shape_problems
        if not problems:
            problems += [
                f"{_show(values)} is outside its limits: {limit.text}"
                for limit in self.limits
                if not limit.holds(values)
            ]
        return problems

    def attribute_problems(self, attributes: Mapping[str, Any]) -> list[str]:
        """Attributes that are unknown, missing, of another type or not legal."""
        known = {attribute.name: attribute for attribute in self.attributes}
        problems = [
            f"unknown attribute {name!r}; known: {', '.join(known)}" for name in attributes if name not in known
        ]
        python: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
        for name, attribute in known.items():
            if name not in attributes:
                problems.append(f"attribute {name!r} is missing: {attribute.doc}")
            elif not isinstance(attributes[name], python[attribute.type]):
                problems.append(f"attribute {name}={attributes[name]!r} must be of type {attribute.type}")
            elif attribute.legal and attributes[name] not in attribute.legal:
                legal = ", ".join(map(str, attribute.legal))
                problems.append(f"attribute {name}={attributes[name]!r} must be one of {legal}")
        return problems

    def _values(
        self, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        values: dict[str, Any] = dict(attributes)
        problems = []
        checks: list[tuple[TensorSpec, int, Operand, int]] = []
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(tensor.shape):
                problems.append(f"{tensor.name} has shape {list(shape)}; takes {tensor}")
                continue
            for axis, (expected, size) in enumerate(zip(tensor.shape, shape, strict=True)):
                if isinstance(expected, Expr) and expected.operation == "symbol":
                    bound = values.setdefault(expected.operands[0], size)
                    if bound != size:
                        problems.append(
                            f"{tensor.name} axis {axis} is {size}, but {expected} is {bound} elsewhere; takes {tensor}"
                        )
                else:
                    checks.append((tensor, axis, expected, size))
        for tensor, axis, expected, size in checks if not problems else ():
            wanted = evaluate(expected, values)
            if wanted != size:
                problems.append(f"{tensor.name} axis {axis} is {size}; {expected} = {wanted} is needed")
        return values, problems


def _show(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


@dataclass(frozen=True)
class Cost:
    """Of one launch, or of several together."""

    loaded_bytes: int = 0
    """By all programs; what two of them load counts twice."""
    stored_bytes: int = 0
    memory_bytes: int = 0
    """Each byte that is read or written, once: what has to cross the memory bus however good the caches are."""
    flops: int = 0
    """Floating-point operations of products and sums; comparisons and exponentials are not counted."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, field.name) * times for field in fields(self)))


CostModel = Callable[[Binding, Tile, int], Cost]
"""(node, tile, past) -> cost of its launch, where every row of the batch holds `past` tokens before the call.

What depends on the data (how many keys a block of rows keeps together) is taken at its upper bound.
"""


@dataclass(frozen=True)
class Step:
    """One node of a chain. Its values have names within the chain; the operator's inputs and outputs keep theirs."""

    spec: PluginSpec
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class OperatorPlugin:
    """An operator of the `doge` domain as a chain of kernels; what an entry point of `doge_deploy.plugins` names."""

    operator: str
    """Name of the operator: `DynamicMaskAttention`."""
    specs: tuple[PluginSpec, ...]
    chain: Callable[[Mapping[str, Any], frozenset[str]], tuple[Step, ...]]
    """(attributes of the operator's node, names of the inputs that it has) -> steps in order. One chain serves any
    number of new tokens: what is not needed for a call returns at once."""
    domain: str = "doge"
    version: int = 1
    costs: Mapping[str, CostModel] = field(default_factory=dict)
    """By name of the kernel; one without a model cannot be put into a roofline."""
