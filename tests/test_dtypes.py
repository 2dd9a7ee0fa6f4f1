"""The table of dtypes agrees with every library whose names it has."""

from __future__ import annotations

import typing

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import _TYPES

from doge_deploy.devices.tensorrt_limits import TENSORRT_DTYPES
from doge_deploy.dtypes import BY_ONNX, BY_TAG, DTYPES, FLOATS, NAMES, DType, ShortName, item_bytes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_onnx(dtype: DType) -> None:
    assert onnx.TensorProto.DataType.Value(dtype.onnx) == dtype.onnx_number
    known = ir.DataType(dtype.onnx_number)
    assert (known.name, known.bitwidth) == (dtype.onnx, dtype.bits)
    assert BY_ONNX[known] is dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_numpy(dtype: DType) -> None:
    found = getattr(ml_dtypes, dtype.name, None) or dtype.name
    assert np.dtype(found).itemsize == dtype.nbytes(1)


@pytest.mark.parametrize("tag", list(BY_TAG))
def test_torch_and_safetensors(tag: str) -> None:
    assert _TYPES[tag] == getattr(torch, BY_TAG[tag].name)
    assert _TYPES[tag].itemsize == BY_TAG[tag].item_bytes


def test_every_stored_tag_has_a_type() -> None:
    assert {dtype.tag for dtype in DTYPES.values()} == BY_TAG.keys()


def test_the_dtypes_of_a_model() -> None:
    assert tuple(NAMES) == typing.get_args(ShortName)
    assert FLOATS == ("float32", "float16", "bfloat16")
    assert {short: item_bytes(short) for short in NAMES} == {"fp32": 4, "fp16": 2, "bf16": 2}
    assert all(item_bytes(short) == item_bytes(name) for short, name in NAMES.items())


def test_half_a_byte() -> None:
    assert [DTYPES["uint4"].nbytes(count) for count in (0, 1, 2, 3)] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="uint4 takes 4 bits"):
        item_bytes("uint4")


def test_tensorrt_has_no_name_that_is_not_in_the_table() -> None:
    assert TENSORRT_DTYPES.keys() <= DTYPES.keys()
