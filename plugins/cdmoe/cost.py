"""What the CDMoE kernels load, store and calculate; see `doge_deploy.kernels.cost`. Symbols as in `spec.py`."""

from __future__ import annotations

from collections.abc import Mapping

from doge_deploy.dtypes import item_bytes
from doge_deploy.kernels.spec import Binding, Cost, CostModel, Tile

ID, WEIGHT, SCALE = 4, 4, 4
"""Bytes."""


def route(binding: Binding, tile: Tile, past: int) -> Cost:
    v = binding.values
    tokens = v["B"] * v["Q"]
    loaded = tokens * v["router_width"] * item_bytes(binding.dtype)
    stored = tokens * v["num_experts_per_tok"] * (ID + WEIGHT)
    return Cost(loaded, stored, loaded + stored, 0)


def _experts(binding: Binding, table_bytes: int, scale_bytes: int) -> Cost:
    v = binding.values
    tokens, k, hidden = v["B"] * v["Q"], v["k"], v["C"]
    row = hidden * item_bytes(binding.dtype)
    expert = 2 * (hidden * table_bytes + scale_bytes)
    loaded = tokens * (row + k * (ID + WEIGHT + expert))
    stored = tokens * row
    # of several tokens some choose the same expert: at most all of these, and no more than there are
    distinct = min(tokens * k, v["E"])
    memory = tokens * (2 * row + k * (ID + WEIGHT)) + distinct * expert
    return Cost(loaded, stored, memory, tokens * k * 4 * hidden)


def experts(binding: Binding, tile: Tile, past: int) -> Cost:
    return _experts(binding, item_bytes(binding.dtype), 0)


def experts_int8(binding: Binding, tile: Tile, past: int) -> Cost:
    return _experts(binding, 1, SCALE)


COSTS: Mapping[str, CostModel] = {
    "CDMoERoute": route,
    "CDMoEExperts": experts,
    "CDMoEExpertsInt8": experts_int8,
}
