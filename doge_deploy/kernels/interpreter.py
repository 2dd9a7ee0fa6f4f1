"""Two repairs of Triton's interpreter, so that bfloat16 on the CPU is what it is on a GPU.

Found in Triton 3.9.0: a conversion from float32 to bfloat16 cuts the mantissa where a GPU rounds to nearest even, and
`tl.dot` multiplies the bit patterns of bfloat16 operands as if they were integers. Delete this file when
`tests/kernels/test_interpreter.py` says that the interpreter does both right by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def round_to_bfloat16(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Bit patterns of the nearest bfloat16 numbers, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    result: np.ndarray[Any, np.dtype[np.uint16]] = np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    return result


def widen_bfloat16(bits: np.ndarray[Any, np.dtype[np.uint16]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The float32 numbers of bfloat16 bit patterns."""
    widened: np.ndarray[Any, np.dtype[np.float32]] = (bits.astype(np.uint32) << 16).view(np.float32)
    return widened


def repair_interpreter() -> None:
    """Repair the interpreter of this process; calling it again does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "doge_deploy_repaired", False):
        return
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(round_to_bfloat16(source.data), tl.bfloat16)
        return original_cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            return cast_impl(self, source, target)
        return original_fp_to_fp(self, source, target, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        wide = [
            interpreter.TensorHandle(widen_bfloat16(side.data), tl.float32)
            if side.dtype.scalar == tl.bfloat16
            else side
            for side in (a, b)
        ]
        return original_dot(self, *wide, *others)

    original_fp_to_fp = builder.create_fp_to_fp
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    builder.doge_deploy_repaired = True
