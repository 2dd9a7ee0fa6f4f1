"""Dimensions that may be unknown until a model runs, by name; the algebra of `expressions` over them.

A dimension is a number, or the name of an axis (`sequence_length`), or None where nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from doge_deploy.kernels.expressions import INT_OPERATIONS, Expr, Operand, evaluate

Dimension: TypeAlias = "int | str | None"

_TEXT = {"add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "floordiv": "({} // {})"}


def _operation(name: str) -> Callable[[Any, Any], Dimension]:
    def apply(left: Dimension, right: Dimension) -> Dimension:
        if left is None or right is None:
            return None
        if isinstance(left, int) and isinstance(right, int):
            value: int = INT_OPERATIONS[name](left, right)
            return value
        return _TEXT.get(name, name + "({}, {})").format(left, right)

    return apply


OPERATIONS: Mapping[str, Callable[[Any, Any], Dimension]] = {name: _operation(name) for name in INT_OPERATIONS}
"""Numbers are calculated, names become text: `min(past_sequence_length, 2111)`."""


def bind(shapes: Sequence[tuple[Operand, ...]], found: Sequence[Sequence[Dimension]]) -> dict[str, Dimension]:
    """What each symbol of `shapes` stands for; a number is preferred to a name, and a name to nothing.

    Args:
        shapes: of a spec's inputs.
        found: of the values that are given to them; a rank that differs binds nothing.
    """
    values: dict[str, Dimension] = {}
    for shape, dimensions in zip(shapes, found, strict=False):
        if len(shape) != len(dimensions):
            continue
        for symbol, dimension in zip(shape, dimensions, strict=True):
            if isinstance(symbol, Expr) and symbol.operation == "symbol":
                name = symbol.operands[0]
                known = values.get(name)
                better = known is None or (isinstance(known, str) and isinstance(dimension, int))
                values[name] = dimension if better else known
    return values


def dimension(size: Operand, values: Mapping[str, Any]) -> Dimension:
    """`size` with `values` in it; symbols without a value are unknown."""
    if not isinstance(size, Expr):
        return size
    known = {name: values.get(name) for name in size.symbols}
    result: Dimension = evaluate(size, known, OPERATIONS)
    return result
