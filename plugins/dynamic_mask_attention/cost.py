"""What the attention kernels load, store and calculate; see `doge_deploy.plugins.cost`.

Symbols as in `spec.py`. "Ends" are how many slots each row sees. Kernels for a growing cache (`Masked`) have no model:
engines have static caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from doge_deploy.plugins.cost import ITEM_BYTES, Cost, CostModel
from doge_deploy.plugins.spec import Binding, Tile

SELECT_PASSES = 6
"""Over the scores of a block that sees more than w slots: four of the radix select, one for ties, one for the list."""

FIRST_SLOT, COUNT, SCORE, SLOT = 8, 4, 4, 4
"""Bytes of an element of `first_slot` and `kept_count`, of a score, of a slot in a list."""


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _row_bytes(binding: Binding) -> int:
    """A row of K or V, or of a query head."""
    size: int = binding.values["D"] * ITEM_BYTES[binding.dtype]
    return size


def _blocks(values: Mapping[str, Any], rows: int, past: int) -> Iterator[tuple[int, int]]:
    """(rows, slots that the last of them sees) of each block of `rows` rows."""
    for start in range(0, values["Q"], rows):
        here = min(rows, values["Q"] - start)
        yield here, min(past + start + here, values["K"])


def _ends(values: Mapping[str, Any], past: int) -> list[int]:
    return [end for _, end in _blocks(values, 1, past)]


def select(binding: Binding, tile: Tile, past: int) -> Cost:
    v = binding.values
    rows, window = v["rows"], v["keep_window_size"]
    loaded = stored = 0
    for here, end in _blocks(v, rows, past):
        selecting = end > window
        loaded += FIRST_SLOT + SCORE * end * (SELECT_PASSES if selecting else 1)
        kept = min(end, window + here - 1) if selecting else end
        stored += COUNT + SLOT * kept + (SCORE + SLOT) * here
        if rows == 1:
            loaded += SCORE * selecting
        else:
            # candidates for the rows' last kept keys: written, read again, and their scores
            candidates = here if selecting else 0
            loaded += (SCORE + SCORE + SLOT) * candidates + SCORE * here
            stored += (SCORE + SLOT) * candidates
    planes = v["B"] * v["S"]
    end = max(_ends(v, past))
    written = sum(COUNT + SLOT * min(end, window + here - 1) for here, end in _blocks(v, rows, past))
    memory = planes * (SCORE * end + written + (SCORE + SLOT) * v["Q"]) + v["B"] * FIRST_SLOT
    return Cost(planes * loaded, planes * stored, memory)


def prefill(binding: Binding, tile: Tile, past: int) -> Cost:
    v, row = binding.values, _row_bytes(binding)
    group, planes = v["H"] // v["S"], v["B"] * v["S"]
    loaded = pairs = 0
    for here, end in _blocks(v, tile.constants["BLOCK_ROWS"], past):
        loaded += FIRST_SLOT + here * group * row + end * (SCORE + 2 * row)
        pairs += here * group * end
    queries = v["B"] * v["H"] * v["Q"] * row
    end = max(_ends(v, past))
    memory = 2 * queries + planes * end * SCORE + v["B"] * (v["Hkv"] * end * 2 * row + FIRST_SLOT)
    return Cost(planes * loaded, queries, memory, planes * pairs * 4 * v["D"])


def prefill_selected(binding: Binding, tile: Tile, past: int) -> Cost:
    v, row = binding.values, _row_bytes(binding)
    group, planes = v["H"] // v["S"], v["B"] * v["S"]
    # a list has w + rows - 1 places, fewer where the cache has fewer slots
    window = v["W"] - v["rows"] + 1 if v["W"] < v["K"] else v["K"]
    loaded = pairs = lists = 0
    for listed_rows, end in _blocks(v, v["rows"], past):
        keys = min(end, window + listed_rows - 1)
        lists += COUNT + SLOT * keys
        for start in range(0, listed_rows, tile.constants["BLOCK_ROWS"]):
            here = min(tile.constants["BLOCK_ROWS"], listed_rows - start)
            # every query head of a group loads the row's threshold, padding to a power of two too
            loaded += FIRST_SLOT + COUNT + here * (group * row + (SCORE + SLOT) * tile.constants["PACK"])
            loaded += keys * (SLOT + SCORE + 2 * row)
            pairs += here * group * keys
    queries = v["B"] * v["H"] * v["Q"] * row
    keys = min(max(_ends(v, past)), window + v["Q"] - 1)
    memory = 2 * queries + planes * (keys * SCORE + lists + (SCORE + SLOT) * v["Q"])
    memory += v["B"] * (v["Hkv"] * keys * 2 * row + FIRST_SLOT)
    return Cost(planes * loaded, queries, memory, planes * pairs * 4 * v["D"])


def _decode(binding: Binding, past: int, *, selected: bool) -> Cost:
    v, row = binding.values, _row_bytes(binding)
    group, split = v["H"] // v["S"], v["split_keys"]
    slots = v["W"] if selected else v["K"]
    parts = _ceil(slots, split)
    loaded = stored = pairs = memory = 0
    for end in _ends(v, past):
        keys = min(end, slots)
        loaded += parts * ((COUNT if selected else FIRST_SLOT) + group * row) + keys * (SCORE + 2 * row)
        loaded += SLOT * keys * selected
        stored += group * (8 * parts + 4 * v["D"] * _ceil(keys, split))
        memory += (SLOT * keys + COUNT) * selected
        pairs += group * keys
    planes = v["B"] * v["S"]
    end = max(_ends(v, past))
    # rows keep different keys; together no more than their union can be
    keys = min(end, slots + v["Q"] - 1) if selected else end
    memory = planes * (memory + keys * SCORE + stored) + v["B"] * v["Hkv"] * keys * 2 * row
    memory += v["B"] * v["H"] * v["Q"] * row + (0 if selected else v["B"] * FIRST_SLOT)
    return Cost(planes * loaded, planes * stored, memory, planes * pairs * 4 * v["D"])


def decode(binding: Binding, tile: Tile, past: int) -> Cost:
    return _decode(binding, past, selected=False)


def decode_selected(binding: Binding, tile: Tile, past: int) -> Cost:
    return _decode(binding, past, selected=True)


def combine(binding: Binding, tile: Tile, past: int) -> Cost:
    v = binding.values
    rows = v["B"] * v["H"] * v["Q"]
    loaded = rows * v["P"] * (8 + 4 * v["D"])
    stored = rows * _row_bytes(binding)
    return Cost(loaded, stored, loaded + stored, rows * v["P"] * 2 * v["D"])


COSTS: Mapping[str, CostModel] = {
    "DynamicMaskSelect": select,
    "DynamicMaskPrefill": prefill,
    "DynamicMaskPrefillSelected": prefill_selected,
    "DynamicMaskDecode": decode,
    "DynamicMaskDecodeSelected": decode_selected,
    "DynamicMaskCombine": combine,
}
