"""Integer expressions over dimensions and attributes: output shapes, launch grids and scalar arguments of a kernel.

An expression is data, so that one text serves PyTorch (plain integers), TensorRT (its symbolic expressions) and a
reader (`str`). Only operations are here that TensorRT's dimension expressions know.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

Operand = Union["Expr", int]

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//"}

INT_OPERATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "cdiv": lambda a, b: -(-a // b),
    "min": min,
    "max": max,
}
"""Every operation on plain integers; another algebra brings its own function for each of these names."""


@dataclass(frozen=True)
class Expr:
    """A symbol, or an operation on two operands."""

    operation: str
    """`symbol`, or a key of `INT_OPERATIONS`."""
    operands: tuple[Any, ...]
    """The symbol's name, or two of `Expr | int`."""

    def __add__(self, other: Operand) -> Expr:
        return Expr("add", (self, other))

    def __sub__(self, other: Operand) -> Expr:
        return Expr("sub", (self, other))

    def __mul__(self, other: Operand) -> Expr:
        return Expr("mul", (self, other))

    def __floordiv__(self, other: Operand) -> Expr:
        return Expr("floordiv", (self, other))

    def evaluate(
        self, values: Mapping[str, Any], operations: Mapping[str, Callable[[Any, Any], Any]] = INT_OPERATIONS
    ) -> Any:
        """The value of the expression.

        Args:
            values: the value of every symbol, in the algebra of `operations`; for a lone symbol it may be anything.
            operations: one function of two arguments for each name of `INT_OPERATIONS`. Operands may be plain
                integers, both of them too.

        Raises:
            KeyError: a symbol has no value.
        """
        if self.operation == "symbol":
            return values[self.operands[0]]
        left, right = (evaluate(operand, values, operations) for operand in self.operands)
        return operations[self.operation](left, right)

    @property
    def symbols(self) -> frozenset[str]:
        """Names of all symbols in it."""
        if self.operation == "symbol":
            return frozenset(self.operands)
        return frozenset().union(*(operand.symbols for operand in self.operands if isinstance(operand, Expr)))

    def __str__(self) -> str:
        if self.operation == "symbol":
            return str(self.operands[0])
        left, right = self.operands
        if self.operation not in _SIGNS:
            return f"{self.operation}({left}, {right})"
        sides = [
            f"({side})" if isinstance(side, Expr) and side.operation in _SIGNS else str(side) for side in (left, right)
        ]
        return f"{sides[0]} {_SIGNS[self.operation]} {sides[1]}"


def sym(name: str) -> Expr:
    """A dimension, an integer attribute, or a constant of a tile, by name."""
    return Expr("symbol", (name,))


def cdiv(dividend: Operand, divisor: Operand) -> Expr:
    """The quotient, rounded up."""
    return Expr("cdiv", (dividend, divisor))


def minimum(left: Operand, right: Operand) -> Expr:
    """The lesser of two."""
    return Expr("min", (left, right))


def maximum(left: Operand, right: Operand) -> Expr:
    """The greater of two."""
    return Expr("max", (left, right))


def evaluate(
    operand: Operand,
    values: Mapping[str, Any],
    operations: Mapping[str, Callable[[Any, Any], Any]] = INT_OPERATIONS,
) -> Any:
    """`operand` itself if it is a number, else its value: see `Expr.evaluate`."""
    return operand.evaluate(values, operations) if isinstance(operand, Expr) else operand
