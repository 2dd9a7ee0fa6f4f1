"""What the attention kernels load, store and calculate; see `doge_deploy.kernels.cost`.

Symbols as in `spec.py`. Kernels for a growing cache (`Masked`) have no model: engines have static caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from doge_deploy.dtypes import item_bytes
from doge_deploy.kernels.spec import Binding, Cost, CostModel, Tile

SELECT_PASSES = 6
"""Over the scores of a block that sees more than w slots: four of the radix select, one for ties, one for the list."""

FIRST_SLOT, COUNT, SCORE, SLOT = 8, 4, 4, 4
"""Bytes of an element of `first_slot` and `kept_count`, of a score, of a slot in a list."""


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _row_bytes(binding: Binding) -> int:
    """A row of K or V, or of a query head."""
    size: int = binding.values["D"] * item_bytes(binding.dtype)
    return size


def _blocks(values: Mapping[str, Any], rows: int, past: int) -> Iterator[tuple[int, int, int]]:
    """(rows, first slot that the first of them sees, slots before the end of what the last one sees) of each block of
    `rows` rows.
    """
    sliding = values.get("sliding_window", 0)
    for start in range(0, values["Q"], rows):
        here = min(rows, values["Q"] - start)
        begin = max(past + start + 1 - sliding, 0) if sliding else 0
        yield here, begin, min(past + start + here, values["K"])


def _end(values: Mapping[str, Any], past: int) -> int:
    """Slots that the last row sees."""
    return min(past + int(values["Q"]), int(values["K"]))


def select(binding: Binding, tile: Tile, past: int) -> Cost:
    v = binding.values
    rows, window = v["rows"], v["keep_window_size"]
    loaded = stored = written = 0
    for here, _, end in _blocks(v, rows, past):
        selecting = end > window
        kept = min(end, window + here - 1) if selecting else end
        loaded += FIRST_SLOT + SCORE * end * (SELECT_PASSES if selecting else 1)
        stored += COUNT + SLOT * kept + (SCORE + SLOT) * here
        written += COUNT + SLOT * kept
        if here == 1:
            loaded += SCORE * selecting
        else:
            # candidates for the rows' last kept keys: written, read again, and their scores
            candidates = here if selecting else 0
            loaded += (SCORE + SCORE + SLOT) * candidates + SCORE * here
            stored += (SCORE + SLOT) * candidates
    planes = v["B"] * v["S"]
    memory = planes * (SCORE * _end(v, past) + written + (SCORE + SLOT) * v["Q"]) + v["B"] * FIRST_SLOT
    return Cost(planes * loaded, planes * stored, memory)


def _walk(binding: Binding, tile: Tile, past: int, parts: int, entries: int, *, selected: bool) -> tuple[int, int, int]:
    """Loaded bytes of all tiles of one score head of one batch, pairs of row and key, and bytes that lists take.

    Args:
        parts: programs that a tile's keys are split among; each loads the tile's rows.
        entries: the most that a list holds, or slots.
    """
    v, row = binding.values, _row_bytes(binding)
    group, rows = v["H"] // v["S"], tile.constants["BLOCK_ROWS"]
    list_rows = v["rows"] if selected else rows
    # a list has w + rows - 1 places, fewer where the cache has fewer slots
    window = v["W"] - list_rows + 1 if selected and v["W"] < v["K"] else v["K"]
    loaded = pairs = lists = 0
    for listed, begin, end in _blocks(v, list_rows, past):
        keys = min(end - begin, window + listed - 1, entries) if selected else end - begin
        lists += (COUNT + SLOT * keys) * selected
        for start in range(0, listed, rows):
            here = min(rows, listed - start)
            loaded += parts * (FIRST_SLOT + here * group * row)
            # every query head of a group loads the row's threshold, padding to a power of two too
            loaded += parts * (COUNT + here * (SCORE + SLOT) * tile.constants["PACK"]) * selected
            loaded += keys * (SCORE + 2 * row + SLOT * selected)
            pairs += here * group * keys
    return loaded, pairs, lists


def _memory(binding: Binding, past: int, lists: int, *, selected: bool) -> int:
    """What an attention reads, each byte once: queries, and of the keys those that any row keeps."""
    v, row = binding.values, _row_bytes(binding)
    planes = v["B"] * v["S"]
    _, begin, end = next(_blocks(v, v["Q"], past))
    keys = end - begin
    memory = planes * lists
    if selected:
        # lists of several blocks differ; together they are no more than their union can be
        keys = min(end, (v["W"] - v["rows"] + 1 if v["W"] < v["K"] else v["K"]) + v["Q"] - 1)
        memory += planes * (SCORE + SLOT) * v["Q"]
    memory += v["B"] * v["H"] * v["Q"] * row + v["B"] * FIRST_SLOT
    return int(memory + planes * keys * SCORE + v["B"] * v["Hkv"] * keys * 2 * row)


def _split(binding: Binding, tile: Tile, past: int, *, selected: bool) -> Cost:
    v = binding.values
    if v["Q"] > binding.spec.constants["SPLIT_ROWS"]:
        return Cost()
    split, planes, group = v["split_keys"], v["B"] * v["S"], v["H"] // v["S"]
    entries = v["W"] if selected else v["K"]
    parts = _ceil(entries, split)
    loaded, pairs, lists = _walk(binding, tile, past, parts, entries, selected=selected)
    stored = 0
    for _, begin, end in _blocks(v, 1, past):
        full = _ceil(min(end, entries), split) - begin // split
        stored += group * (8 * parts + 4 * v["D"] * full)
    memory = _memory(binding, past, lists, selected=selected) + planes * stored
    return Cost(planes * loaded, planes * stored, memory, planes * pairs * 4 * v["D"])


def _attend(binding: Binding, tile: Tile, past: int, *, selected: bool) -> Cost:
    v = binding.values
    output = v["B"] * v["H"] * v["Q"] * _row_bytes(binding)
    if v["Q"] <= binding.spec.constants["SPLIT_ROWS"]:
        rows = v["B"] * v["H"] * v["Q"]
        loaded = rows * v["P"] * (8 + 4 * v["D"])
        return Cost(loaded, output, loaded + output, rows * v["P"] * 2 * v["D"])
    planes = v["B"] * v["S"]
    loaded, pairs, lists = _walk(binding, tile, past, 1, v["W"] if selected else v["K"], selected=selected)
    memory = _memory(binding, past, lists, selected=selected) + output
    return Cost(planes * loaded, output, memory, planes * pairs * 4 * v["D"])


def split(binding: Binding, tile: Tile, past: int) -> Cost:
    return _split(binding, tile, past, selected=False)


def split_selected(binding: Binding, tile: Tile, past: int) -> Cost:
    return _split(binding, tile, past, selected=True)


def attend(binding: Binding, tile: Tile, past: int) -> Cost:
    return _attend(binding, tile, past, selected=False)


def attend_selected(binding: Binding, tile: Tile, past: int) -> Cost:
    return _attend(binding, tile, past, selected=True)


COSTS: Mapping[str, CostModel] = {
    "DynamicMaskSelect": select,
    "DynamicMaskSplit": split,
    "DynamicMaskSplitSelected": split_selected,
    "DynamicMaskAttend": attend,
    "DynamicMaskAttendSelected": attend_selected,
}
