"""Tile sizes of the attention kernels by device, each with its reason.

Three things bound a tile. Registers: a spilled accumulator costs more than a small tile. Shared memory: about 48 KiB,
although every device has more (`doge_deploy/kernels/devices.py`): two programs then share a multiprocessor. And what
multiplies: tensor cores take float16 and bfloat16 from sm_80 on; float32 stays exact, and Triton has no path
to the tensor cores of sm_75, so there the tile is multiplied by ordinary instructions, out of registers.
Figures are those of `doge-deploy plugins compile` at D 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doge_deploy.kernels.spec import Tile


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    size = least
    while size < number:
        size *= 2
    return size


def head_block(values: Mapping[str, Any]) -> int:
    """Columns of a tile that holds a head: a power of two, and 16 at least, which tensor cores need."""
    return power_of_two(values["D"], 16)


def packed_heads(values: Mapping[str, Any]) -> int:
    """Query heads that share a score head, padded to a power of two."""
    return power_of_two(values["H"] // values["S"])


def has_tensor_cores(arch: int, dtype: str) -> bool:
    """Whether `tl.dot` becomes tensor core instructions."""
    return arch >= 80 and dtype != "float32"


def select_tile(arch: int, values: Mapping[str, Any], dtype: str) -> Tile:
    """Scores are streamed by one program, so a tile is wide: fewer trips, more loads in flight.

    Eight slots a thread with eight warps: some 130 registers, which is no matter where there is one program a score
    head; left to itself ptxas spills 8 bytes on sm_80, but allowed 255 it takes them all on sm_75, and spills too. 8 to
    16 KiB for the histograms.
    """
    return Tile({"BLOCK_SLOTS": 2048}, num_warps=8, num_stages=1, max_registers=255 if arch >= 80 else None)


def attend_tile(arch: int, values: Mapping[str, Any], dtype: str) -> Tile:
    """Rows of queries, times the heads that are packed, by keys; and 32 parts of a row to combine, the 17 of a window
    of 2048 in one go.
    """
    size, pack = head_block(values), packed_heads(values)
    if has_tensor_cores(arch, dtype):
        # 64 rows are 16 a warp. The accumulator then takes 64 registers a thread at D 128, and the tile of logits 16.
        # At D 64 there is room for twice the keys on sm_90 to sm_110 (elsewhere that is a few registers too many). At
        # D 256 the accumulator would take 128 and spill: half the rows, twice the warps, and one stage, to stay near
        # 48 KiB. From sm_90 on ptxas left to itself stops at 128 or 168 registers and spills up to 52 bytes.
        packed_rows, keys, warps, stages = 64, 32, 4, 2
        registers = 255 if arch >= 90 else None
        if size <= 64 and 90 <= arch < 120:
            keys = 64
        elif size > 128:
            packed_rows, warps, stages, registers = 32, 8, 1, 255
    else:
        # Operands of ordinary multiplications live in registers: many warps and a small tile, or it spills (32 by 32
        # with 4 warps: 1804 bytes, with 8: 532). Nothing is loaded ahead, there is arithmetic enough to wait behind;
        # with a second stage ptxas spills 40 bytes on sm_87 to run more programs.
        packed_rows, keys, warps, stages, registers = 32 if size <= 128 else 16, 16, 16, 1, 128
    # a block of rows must lie within one list of keys, and be 16 packed rows at least
    block_rows = max(min(packed_rows // pack, values.get("rows", 64)), 16 // pack)
    constants = {"BLOCK_ROWS": block_rows, "PACK": pack, "BLOCK_KEYS": keys, "BLOCK_PARTS": 32, "BLOCK_D": size}
    return Tile(constants, warps, stages, registers)


def split_tile(arch: int, values: Mapping[str, Any], dtype: str) -> Tile:
    """The least number of rows that fills a tensor core's operand, 16 with the heads that are packed.

    Loads decide here, not arithmetic: 32 keys of K and V are 16 KiB in flight at D 128 in 16 bits.
    """
    size, pack = head_block(values), packed_heads(values)
    if has_tensor_cores(arch, dtype):
        keys, warps, stages, registers = 32, 4, 2 if size <= 128 else 1, None
    else:
        # as in `attend_tile`: ptxas would take 64 registers on sm_75 to sm_89 and spill 8 bytes, where 92 hold all
        keys, warps, stages, registers = 16, 8, 1, 255
    constants = {"BLOCK_ROWS": 16 // pack, "PACK": pack, "BLOCK_KEYS": keys, "BLOCK_D": size}
    return Tile(constants, warps, stages, registers)
