"""Data that an initializer is going to have: graph/weights.py attaches it when all passes are done."""

from __future__ import annotations

import onnx_ir as ir


def pending(dtype: ir.DataType, shape: ir.Shape, name: str | None) -> ir.LazyTensor:
    """A tensor of which only dtype and shape are known; to ask for its numbers is an error."""
    return ir.LazyTensor(_without_data, dtype=dtype, shape=shape, name=name)


def _without_data() -> ir.TensorProtocol:
    raise RuntimeError("this initializer has no data before graph/weights.py attaches it")
