"""Weights of few bits in an engine: whether kernels multiply with them as they are stored.

A builder may widen such a weight in a kernel of its own instead, in every call, or once for all when it builds. Then
the engine computes the same numbers and gains nothing: it reads more memory than in half precision, or as much. The
list of kernels shows it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from doge_deploy.targets.trt.layers import Kernel

LOW_BITS = frozenset({ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1})
"""Of weights in a lowered graph."""

VENDOR_LOW_BITS = frozenset({"Int4", "FP8", "FP4E2M1"})
"""The same in the builder's list."""


def low_bit_numbers(model: ir.Model) -> int:
    """Numbers of few bits that are read: those of each weight once for every reader of its dequantized value."""
    return sum(
        prod(weight.shape.numpy()) * max(1, len(list(_readers(node.outputs[0]))))
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        and (weight := node.inputs[0]) is not None
        and weight.is_initializer()
        and weight.dtype in LOW_BITS
        and weight.shape is not None
        and not _is_scale(node.outputs[0])
    )


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    for use in value.uses():
        if use.node.op_type == "Transpose":
            yield from _readers(use.node.outputs[0])
        else:
            yield use.node


def _is_scale(value: ir.Value) -> bool:
    """Whether a value is the scale of another weight, and only that."""
    return all(use.node.op_type == "DequantizeLinear" and use.idx == 1 for use in value.uses())


@dataclass(frozen=True)
class LowBits:
    """What the builder's list shows."""

    kernels: int
    """That read a weight of few bits."""
    numbers: int
    """Of few bits that kernels read beside what they are multiplied with, each weight once a kernel."""
    alone: tuple[str, ...]
    """Kernels that read such a weight and nothing that depends on a call."""


def examine(kernels: Sequence[Kernel], bindings: Collection[str]) -> LowBits:
    """Read the list.

    Args:
        kernels: the builder's list; it must say what each reads.
        bindings: inputs and outputs of the engine.
    """
    changing = {*bindings, *(output["name"] for kernel in kernels for output in kernel.outputs)}
    found, numbers, alone = 0, 0, []
    for kernel in kernels:
        weights = {
            read["name"]: read["shape"]
            for read in kernel.inputs
            if read["dtype"] in VENDOR_LOW_BITS and read["name"] not in changing
        }
        if not weights:
            continue
        found += 1
        if any(read["name"] in changing for read in kernel.inputs):
            numbers += sum(prod(map(int, shape.split(","))) for shape in weights.values())
        else:
            alone.append(kernel.name)
    return LowBits(found, numbers, tuple(alone))


def problem(found: LowBits, expected: int) -> str:
    """What is wrong, in words that follow the builder's name; "" where nothing is.

    Args:
        found: what `examine` gave.
        expected: what `low_bit_numbers` said of the graph.
    """
    if found.alone:
        more = f" and {len(found.alone) - 1} more" if len(found.alone) > 1 else ""
        return (
            f"widens weights of few bits in every call instead of multiplying with them: kernel {found.alone[0]}{more} "
            "reads a weight and nothing else"
        )
    if found.numbers < expected:
        return (
            f"widened weights of few bits when it built: kernels read {found.numbers} of their {expected} numbers as "
            "they are stored"
        )
    return ""
