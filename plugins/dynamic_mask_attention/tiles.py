"""Tile sizes of the attention kernels by device, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doge_deploy.plugins.spec import Tile


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


def select_tile(arch: int, values: Mapping[str, Any], dtype: str) -> Tile:
    """Scores are streamed by one program, so a tile is wide: fewer trips, more loads in flight."""
    return Tile({"BLOCK_SLOTS": 1024}, num_warps=8, num_stages=1)


def prefill_tile(arch: int, values: Mapping[str, Any], dtype: str) -> Tile:
    """Rows of queries (times heads) by keys."""
    size, pack = head_block(values), packed_heads(values)
    rows = 64 if size <= 128 else 32
    block_rows = min(max(rows // pack, 1), values.get("rows", 64))
    block_rows = max(block_rows, -(-16 // pack))
    return Tile({"BLOCK_ROWS": block_rows, "PACK": pack, "BLOCK_KEYS": 32, "BLOCK_D": size}, num_warps=4, num_stages=2)


def decode_tile(arch: int, values: Mapping[str, Any], dtype: str) -> Tile:
    """One row with its packed heads, padded to the 16 rows of a tensor core's operand."""
    return Tile(
        {"PACK": power_of_two(packed_heads(values), 16), "BLOCK_KEYS": 32, "BLOCK_D": head_block(values)},
        num_warps=4,
        num_stages=2,
    )


def combine_tile(arch: int, values: Mapping[str, Any], dtype: str) -> Tile:
    """One row of one head; parts are few."""
    return Tile({"BLOCK_PARTS": 16, "BLOCK_D": power_of_two(values["D"])}, num_warps=4, num_stages=1)
