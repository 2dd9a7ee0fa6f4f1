"""What is wrong with a plugin node, found before TensorRT sees it; dimensions may be names.

TensorRT itself says of any of this "Plugin not found, are the plugin name, version, and namespace correct?", or nothing
until a kernel reads beyond its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from doge_deploy.diagnostics import suggest
from doge_deploy.kernels import symbols
from doge_deploy.kernels.expressions import Expr
from doge_deploy.kernels.registry import Registry
from doge_deploy.kernels.spec import Limit, PluginSpec
from doge_deploy.kernels.symbols import Dimension


@dataclass(frozen=True)
class PluginNode:
    """A node as its graph describes it."""

    name: str
    plugin: str
    namespace: str
    version: str
    attributes: Mapping[str, Any]
    """Without those that say which plugin it is."""
    dtypes: Sequence[str | None]
    """Of the inputs, NumPy's names; None where the graph does not say."""
    shapes: Sequence[Sequence[Dimension] | None]
    """Of the inputs; None where the graph does not say."""
    num_outputs: int

    @property
    def id(self) -> str:
        return f"{self.namespace}::{self.plugin}"


@dataclass(frozen=True)
class Verdict:
    """What was found about one node."""

    node: PluginNode
    spec: PluginSpec | None
    problems: tuple[str, ...]
    undecided: tuple[str, ...]
    """Limits that depend on dimensions which the graph leaves open."""


def check_node(node: PluginNode, registry: Registry) -> Verdict:
    """Compare a node with the plugins that are there."""
    spec = registry.spec(node.id)
    if spec is None or spec.version != node.version:
        return Verdict(node, None, (_not_registered(node, registry),), ())
    problems = list(spec.attribute_problems(node.attributes))
    if len(node.shapes) != len(spec.inputs):
        takes = ", ".join(map(str, spec.inputs))
        return Verdict(node, spec, (*problems, f"{len(node.shapes)} inputs; takes {len(spec.inputs)}: {takes}"), ())
    if node.num_outputs != len(spec.outputs):
        problems.append(f"{node.num_outputs} outputs; gives {len(spec.outputs)}: {', '.join(map(str, spec.outputs))}")
    problems += _dtype_problems(spec, node.dtypes)
    values, shape_problems = _bind(spec, node)
    problems += shape_problems
    undecided: list[str] = []
    if not problems:
        for limit in spec.limits:
            holds = _decide(limit, values, node.attributes)
            if holds is None:
                undecided.append(limit.text)
            elif not holds:
                known = ", ".join(f"{name}={value}" for name, value in values.items() if isinstance(value, int))
                problems.append(f"{known} is outside its limits: {limit.text}")
    return Verdict(node, spec, tuple(problems), tuple(undecided))


def _not_registered(node: PluginNode, registry: Registry) -> str:
    specs = list(registry.specs())
    for spec in specs:
        if spec.id == node.id:
            return f"plugin {node.id} is registered as version {spec.version}, the node asks for version {node.version}"
        if spec.name == node.plugin:
            return (
                f"plugin {node.plugin} is registered in namespace {spec.namespace!r}, the node says "
                f"{node.namespace!r} (attribute plugin_namespace)"
            )
    known = ", ".join(spec.id for spec in specs) or "none"
    return f"no plugin {node.id} is registered{suggest(node.id, [spec.id for spec in specs])}; registered: {known}"


def _dtype_problems(spec: PluginSpec, dtypes: Sequence[str | None]) -> Iterator[str]:
    shared: dict[str, str] = {}
    for tensor, dtype in zip(spec.inputs, dtypes, strict=True):
        if dtype is None:
            yield f"the graph does not say which dtype {tensor.name} has; takes {tensor}"
        elif tensor.dtype != "T":
            if dtype != tensor.dtype:
                yield f"{tensor.name} is {dtype}; takes {tensor}"
        else:
            first = next(iter(shared), None)
            shared[tensor.name] = dtype
            if dtype not in spec.dtypes:
                yield f"{tensor.name} is {dtype}; takes {tensor}, T one of {', '.join(spec.dtypes)}"
            elif first is not None and shared[first] != dtype:
                yield f"{tensor.name} is {dtype}, but {first} is {shared[first]}; both are of dtype T"


def _bind(spec: PluginSpec, node: PluginNode) -> tuple[dict[str, Dimension], list[str]]:
    problems = []
    known_shapes: list[Sequence[Dimension]] = []
    for tensor, shape in zip(spec.inputs, node.shapes, strict=True):
        known_shapes.append([None] * len(tensor.shape) if shape is None else shape)
        if shape is not None and len(shape) != len(tensor.shape):
            problems.append(f"{tensor.name} has {len(shape)} axes {_show(shape)}; takes {tensor}")
    values = symbols.bind([tensor.shape for tensor in spec.inputs], known_shapes)
    for name in spec.static:
        if not isinstance(values.get(name), int) and not problems:
            problems.append(f"{name} is {values.get(name) or 'unknown'}; it must be a number when the engine is built")
    everything = {**values, **node.attributes}
    for tensor, shape in zip(spec.inputs, known_shapes, strict=True):
        for axis, (expected, found) in enumerate(zip(tensor.shape, shape, strict=False)):
            wanted = symbols.dimension(expected, everything)
            # names of axes are not compared: one axis may have several
            if isinstance(wanted, int) and isinstance(found, int) and wanted != found:
                reason = f"{expected} = {wanted}" if isinstance(expected, Expr) else str(wanted)
                problems.append(f"{tensor.name} axis {axis} is {found}; {reason} is needed; takes {tensor}")
    return values, problems


def _show(shape: Sequence[Dimension]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


class _Open(Exception):
    """A dimension was asked for that the graph leaves open."""


class _Values(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is None:
            raise _Open
        return value


def _decide(limit: Limit, dimensions: Mapping[str, Dimension], attributes: Mapping[str, Any]) -> bool | None:
    """Whether a limit holds; None where that depends on an open dimension."""
    numbers = {name: size if isinstance(size, int) else None for name, size in dimensions.items()}
    try:
        return limit.holds(_Values({**numbers, **attributes}))
    except _Open:
        return None
