"""Tile sizes of the CDMoE kernels by device, each with its reason."""

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


def candidates(k: int, keys: int) -> int:
    """Pairs of ranks that can be among the `k` best sums: see `doge_deploy.config.expert_pairs.candidate_pairs`."""
    return sum(min(k // (rank + 1), keys) for rank in range(min(k, keys)))


def route_tile(arch: int, values: Mapping[str, Any], dtype: str) -> Tile:
    """A token is one program: its halves and candidates are a few hundred numbers, sorted in registers."""
    k, keys = values["num_experts_per_tok"], values["router_width"] // 2
    return Tile(
        {
            "BLOCK_KEYS": power_of_two(keys, 2),
            "BLOCK_CANDIDATES": power_of_two(candidates(k, keys), 2),
        },
        num_warps=4,
        num_stages=1,
    )


def experts_tile(arch: int, values: Mapping[str, Any], dtype: str) -> Tile:
    """All experts of a token by a slice of their rows: 8192 numbers in flight, 64 a thread with 4 warps."""
    experts = power_of_two(values["k"])
    columns = min(power_of_two(values["C"]), max(8192 // experts, 64))
    return Tile({"BLOCK_EXPERTS": experts, "BLOCK_HIDDEN": columns}, num_warps=4, num_stages=1)
