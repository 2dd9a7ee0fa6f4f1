"""Element types: every name that one goes by, and its size.

Tables of one vendor (TensorRT's members, Triton's pointers, Python's arrays) stand where they are used and are keyed by
`DType.name`.
Reference: onnx.proto `TensorProto.DataType`; https://github.com/huggingface/safetensors (format).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ShortName = Literal["fp32", "fp16", "bf16"]
"""What options and commands call the dtypes of a model."""


@dataclass(frozen=True)
class DType:
    """One element type."""

    name: str
    """NumPy's and PyTorch's: `float32`. NumPy has no `bfloat16`, neither has types of less than a byte."""
    onnx: str
    """The member of `TensorProto.DataType`."""
    onnx_number: int
    """The value of that member."""
    tag: str
    """safetensors' name; numbers of less than a byte are stored as `U8`."""
    bits: int
    short: ShortName | None = None
    """Of a dtype that a model may have."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one number.

        Raises:
            ValueError: it takes less than a byte, so that only `nbytes` has an answer.
        """
        if self.bits % 8:
            raise ValueError(f"{self.name} takes {self.bits} bits, which is no whole number of bytes")
        return self.bits // 8

    def nbytes(self, count: int) -> int:
        """Bytes of `count` numbers that lie one after another."""
        return -(-count * self.bits // 8)


DTYPES: Mapping[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("float32", "FLOAT", 1, "F32", 32, "fp32"),
        DType("float16", "FLOAT16", 10, "F16", 16, "fp16"),
        DType("bfloat16", "BFLOAT16", 16, "BF16", 16, "bf16"),
        DType("float64", "DOUBLE", 11, "F64", 64),
        DType("complex64", "COMPLEX64", 14, "C64", 64),
        DType("float8_e4m3fn", "FLOAT8E4M3FN", 17, "F8_E4M3", 8),
        DType("float8_e5m2", "FLOAT8E5M2", 19, "F8_E5M2", 8),
        DType("int64", "INT64", 7, "I64", 64),
        DType("int32", "INT32", 6, "I32", 32),
        DType("int16", "INT16", 5, "I16", 16),
        DType("int8", "INT8", 3, "I8", 8),
        DType("uint64", "UINT64", 13, "U64", 64),
        DType("uint32", "UINT32", 12, "U32", 32),
        DType("uint16", "UINT16", 4, "U16", 16),
        DType("uint8", "UINT8", 2, "U8", 8),
        DType("uint4", "UINT4", 21, "U8", 4),
        DType("int4", "INT4", 22, "U8", 4),
        DType("float4_e2m1fn", "FLOAT4E2M1", 23, "U8", 4),
        DType("bool", "BOOL", 9, "BOOL", 8),
    )
}
"""By `DType.name`."""

BY_ONNX: Mapping[int, DType] = {dtype.onnx_number: dtype for dtype in DTYPES.values()}
"""By the number of ONNX's member, which is that of `onnx_ir.DataType` too."""

BY_TAG: Mapping[str, DType] = {dtype.tag: dtype for dtype in DTYPES.values() if dtype.bits % 8 == 0}
"""By safetensors' name."""

NAMES: Mapping[str, str] = {dtype.short: dtype.name for dtype in DTYPES.values() if dtype.short}
"""`fp32` -> `float32`: the dtypes that a model may have, the widest first."""

FLOATS = tuple(NAMES.values())
"""The same by `DType.name`."""


def item_bytes(name: str) -> int:
    """Bytes of one number of the dtype `name`, which may also be its short name."""
    return DTYPES[NAMES.get(name, name)].item_bytes
