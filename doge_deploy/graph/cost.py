"""What a graph of standard operators moves and calculates, by calculation: the other side of a plugin's cost.

The count is kind to the standard operators. A runtime is assumed to fuse everything that it can: only `_LAYERS` read
and write tensors of their own; all nodes between two of them are one pass, which reads what comes from outside and
writes what goes out. Numbers that follow from shapes alone are made on the way and cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx.reference import ReferenceEvaluator

from doge_deploy.kernels.spec import Cost

_LAYERS = {"Attention", "GatherElements", "MatMul", "ScatterElements", "TopK"}
"""Operators that no runtime fuses with their neighbours here; `Gather` too where its indices are data."""

_FREE = {"Constant", "ConstantOfShape", "Range", "Shape"}


def graph_cost(model: ir.Model, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Cost:
    """Bytes and operations of one run.

    Args:
        model: a graph; local functions are inlined. It is changed.
        feeds: inputs of the sizes in question; their numbers do not matter.
    """
    model = common.InlinePass()(model).model
    graph = model.graph
    found: Any = ReferenceEvaluator(ir.to_proto(model)).run(None, dict(feeds), intermediate=True)
    values: dict[str, Any] = {**feeds, **found}
    sizes = {name: _size(array) for name, array in values.items() if name and array is not None}
    layers = [node for node in graph if _is_layer(node)]
    read = written = flops = 0
    passes: dict[str, ir.Value] = {}
    for node in layers:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type in ("Gather", "GatherElements"):
            read += sizes[_name(inputs[1])] + sizes[_name(node.outputs[0])]
        else:
            read += sum(sizes[_name(value)] for value in inputs)
        written += sum(sizes[_name(value)] for value in node.outputs)
        flops += _flops(node, values)
        passes |= {_name(value): value for value in inputs if _is_made(value)}
    passes |= {_name(value): value for value in graph.outputs if _is_made(value)}
    for name, value in passes.items():
        written += sizes[name]
        read += sum(sizes[source] for source in _sources(value))
    return Cost(read, written, read + written, flops)


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _size(array: np.ndarray[Any, Any]) -> int:
    """Bytes; int64 counts as int32, in which TensorRT keeps indices."""
    array = np.asarray(array)
    return array.size * min(array.itemsize, 4)


def _is_layer(node: ir.Node) -> bool:
    if node.op_type == "Gather":
        index = node.inputs[1]
        producer = index.producer() if index is not None else None
        return producer is None or producer.op_type != "Constant"
    return node.op_type in _LAYERS


def _is_made(value: ir.Value) -> bool:
    """By a pass: neither an input of the graph, nor the result of a layer, nor a constant."""
    node = value.producer()
    return node is not None and not _is_layer(node) and node.op_type not in ("Constant", "Shape")


def _sources(value: ir.Value) -> set[str]:
    """Tensors that a pass reads to make `value`."""
    found: set[str] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        assert node is not None
        for source in node.inputs if node.op_type not in _FREE else ():
            if source is None:
                continue
            if source.producer() is None or _is_layer(source.producer()):  # type: ignore[arg-type]
                found.add(_name(source))
            else:
                waiting.append(source)
    return found


def _flops(node: ir.Node, values: Mapping[str, Any]) -> int:
    if node.op_type not in ("MatMul", "Attention"):
        return 0
    arrays = [values[_name(value)] for value in node.inputs if value is not None]
    if node.op_type == "MatMul":
        output = values[_name(node.outputs[0])]
        return 2 * int(output.size) * int(arrays[0].shape[-1])
    batch, heads, rows, size = arrays[0].shape
    return int(4 * batch * heads * rows * arrays[1].shape[2] * size)
