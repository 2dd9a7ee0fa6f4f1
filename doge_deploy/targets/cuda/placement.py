"""Which nodes of a graph ONNX Runtime's CUDA provider runs, and which fall to the CPU: a table against a graph.

The table (`kernels.json`) has, for every operator that a lowered graph may have, the version of the operator that the
provider knows in opset 24 and the element types of each of its type parameters. It was asked of the provider itself,
of one version (`tests/cuda_kernels.py`), since what ONNX Runtime documents as "23+" need not hold for version 24.
"""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir

OPSET = 24

SHAPE_OPERATORS = frozenset(
    "Add Cast Concat Div Equal Gather Identity Max Min Mul Reshape Shape Size Slice Squeeze Sub Unsqueeze".split()
)
"""What ONNX Runtime may compute on the CPU although the provider has kernels: a few whole numbers that begin as a
shape, which lies in the processor's memory anyway."""


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph run."""

    device: Mapping[str, int]
    """Operators with a kernel of the provider, and how many nodes have them."""
    shapes: Mapping[str, int]
    """Arithmetic of shapes: on the CPU, or wherever ONNX Runtime likes."""
    cpu: tuple[str, ...]
    """What falls to the CPU, a sentence a node: the state of the model is copied there and back."""


@cache
def table() -> Mapping[str, Any]:
    """The table as it is stored."""
    file = importlib.resources.files("doge_deploy.targets.cuda") / "kernels.json"
    found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def place(model: ir.Model) -> Placement:
    """Hold every node of a lowered graph against the table.

    Args:
        model: without local functions.
    """
    types = _types(model)
    constant = {value.name for value in model.graph.initializers.values()}
    from_shapes: set[str | None] = set()
    device: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    cpu: list[str] = []
    for node in model.graph:
        names = [value.name for value in node.inputs if value is not None]
        outputs = [value.name for value in node.outputs]
        if node.op_type == "Constant" or (names and all(name in constant for name in names)):
            constant.update(outputs)  # computed once, when the graph is loaded
            continue
        if node.op_type in ("Shape", "Size"):
            from_shapes.update(outputs)
        elif node.op_type in SHAPE_OPERATORS and all(name in from_shapes or name in constant for name in names):
            from_shapes.update(outputs)
            shapes[node.op_type] += 1
            continue
        missing = _missing(node, types)
        if missing:
            cpu.append(f"{node.name} ({node.op_type}): {missing}")
        else:
            device[node.op_type] += 1
    return Placement(dict(device.most_common()), dict(shapes.most_common()), tuple(cpu))


def _missing(node: ir.Node, types: Mapping[str, str]) -> str:
    """Why the provider has no kernel for a node, "" where it has."""
    version = table()["onnxruntime"]
    name = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    entry = table()["operators"].get(name)
    if entry is None:
        return f"{name} is not in the table of onnxruntime-gpu {version}"
    if name == node.op_type:
        since = onnx.defs.get_schema(node.op_type, OPSET, "").since_version
        if since != entry["since"]:
            return f"the table of onnxruntime-gpu {version} knows version {entry['since']} of it, this is {since}"
    for parameter, value in _parameters(node):
        dtype = types.get(value)
        if parameter in entry["types"] and dtype is not None and dtype not in entry["types"][parameter]:
            legal = ", ".join(entry["types"][parameter]) or "nothing"
            return f"{parameter} is {dtype}, and onnxruntime-gpu {version} has kernels for {legal}"
    return ""


_CONTRIB_PARAMETERS = {
    "MatMulNBits": ("T1", "T2", "T1", "T3"),
    "GatherBlockQuantized": ("T1", "Tind", "T2", "T1"),
}


def _parameters(node: ir.Node) -> Iterator[tuple[str, str]]:
    """Type parameters of an operator with the values that have that type."""
    if node.op_type in _CONTRIB_PARAMETERS and node.domain:
        strings = _CONTRIB_PARAMETERS[node.op_type]
        yield from ((text, str(value.name)) for text, value in zip(strings, node.inputs, strict=False) if value)
        return
    schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    for formal, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, value in enumerate(values):
            if value is not None and value.name:
                yield formal[min(index, len(formal) - 1)].type_str, value.name


def _types(model: ir.Model) -> dict[str, str]:
    """Element types of all values, in NumPy's spelling; ONNX infers what the graph does not say."""
    for node in model.graph:  # ONNX knows nothing of ONNX Runtime's own operators
        if node.domain and node.op_type in _CONTRIB_PARAMETERS and node.outputs[0].dtype is None:
            source = node.inputs[0 if node.op_type == "MatMulNBits" else 2]
            if source is not None and source.dtype is not None:
                node.outputs[0].dtype = source.dtype
    proto = ir.to_proto(model)
    del proto.graph.initializer[:]
    listed = {value.name for value in proto.graph.input}
    for name, value in model.graph.initializers.items():
        if name not in listed and value.dtype is not None:
            kind = onnx.helper.make_tensor_type_proto(value.dtype.value, None)
            proto.graph.input.append(onnx.ValueInfoProto(name=name, type=kind))
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    return {
        info.name: _name(info.type.tensor_type.elem_type)
        for infos in (inferred.input, inferred.output, inferred.value_info)
        for info in infos
    }


def _name(elem_type: int) -> str:
    dtype = ir.DataType(elem_type).name.lower()
    return {"float": "float32"}.get(dtype, dtype)
