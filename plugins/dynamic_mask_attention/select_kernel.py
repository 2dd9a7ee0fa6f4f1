"""Triton kernels of doge::DynamicMaskAttention: which keys each row keeps.

    kept[b, s, q] = the w best of score[b, s, j] over the slots j that row q sees, among equals the lowest first

Reference implementation: `doge_deploy.model.attention.keep_mask`. Which kernel takes what: `spec.py`; why the
selection is built as it is: `README.md`. Axes: B batch, S score heads, Q rows of the call, K cache slots, w
keep_window_size. All tensors are contiguous.
"""

# Triton's language has its own types and reads these functions' text, so they are neither typed nor split at will.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(0x7FFFFFFF)
"""Slot, with order key 0, of a place that every key outranks."""


@triton.jit
def _order_key(score):
    """uint32 in the order of the scores; -0 equals 0."""
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    flip = tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return bits ^ flip


@triton.jit
def _outranks(key, slot, other_key, other_slot):
    """Whether (key, slot) goes before the other: the higher score, among equals the lower slot."""
    return (key > other_key) | ((key == other_key) & (slot < other_slot))


@triton.jit
def _load_keys(score_ptr, mask_ptr, start, end, MASKED: tl.constexpr, BLOCK_SLOTS: tl.constexpr):
    """A tile of slots, their order keys, and whether they exist, lie before `end` and are not masked."""
    slots = start + tl.arange(0, BLOCK_SLOTS)
    exists = slots < end
    if MASKED:
        exists = exists & (tl.load(mask_ptr + slots, mask=exists, other=0) != 0)
    return slots, _order_key(tl.load(score_ptr + slots, mask=exists, other=0.0)), exists


@triton.jit
def _next_digit(histogram, prefix, rank):
    """Extend `prefix` by the digit that holds the element of this rank (1 is the largest); its rank within the digit.

    The third result is false where fewer elements than `rank` were counted.
    """
    digits = tl.arange(0, 256)
    at_least = tl.cumsum(histogram, 0, reverse=True)
    found = tl.sum((at_least >= rank).to(tl.int32), 0)
    digit = tl.maximum(found - 1, 0)
    above = tl.sum(tl.where(digits == digit, at_least - histogram, 0), 0)
    return (prefix << 8) | digit.to(tl.uint32), rank - above, found > 0


@triton.jit
def _last_kept(score_ptr, mask_ptr, early_end, end, WINDOW: tl.constexpr, MASKED: tl.constexpr,
               BLOCK_SLOTS: tl.constexpr):  # fmt: skip
    """Order key and slot of the w-th best of the slots before `early_end` and of those before `end`.

    The first is not counted apart where both ends are the same, as for the one row of a decode step.

    Radix select: four passes over the scores, a histogram of 256 digits each, then one to find the slot among equals.
    Key 0 and NOWHERE where there are fewer than w.
    """
    early_key = tl.zeros((), tl.uint32)
    key = tl.zeros((), tl.uint32)
    early_rank = tl.full((), WINDOW, tl.int32)
    rank = tl.full((), WINDOW, tl.int32)
    early_full = early_end > 0
    full = end > 0
    both = early_end < end
    for step in tl.static_range(4):
        early_histogram = tl.zeros((256,), tl.int32)
        histogram = tl.zeros((256,), tl.int32)
        for start in range(0, end, BLOCK_SLOTS):
            slots, keys, exists = _load_keys(score_ptr, mask_ptr, start, end, MASKED, BLOCK_SLOTS)
            digits = ((keys >> (24 - 8 * step)) & 0xFF).to(tl.int32)
            if step == 0:
                same = exists
                early_same = exists & (slots < early_end)
            else:
                same = exists & ((keys >> (32 - 8 * step)) == key)
                early_same = exists & (slots < early_end) & ((keys >> (32 - 8 * step)) == early_key)
            histogram += tl.histogram(digits, 256, mask=same)
            if both:
                early_histogram += tl.histogram(digits, 256, mask=early_same)
        key, rank, found = _next_digit(histogram, key, rank)
        if step == 0:
            full = found
        if both:
            early_key, early_rank, early_found = _next_digit(early_histogram, early_key, early_rank)
            if step == 0:
                early_full = early_found
    slot = tl.full((), 0, tl.int32)
    early_slot = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    early_equal = tl.full((), 0, tl.int32)
    for start in range(0, end, BLOCK_SLOTS):
        slots, keys, exists = _load_keys(score_ptr, mask_ptr, start, end, MASKED, BLOCK_SLOTS)
        ties = (exists & (keys == key)).to(tl.int32)
        place = equal + tl.cumsum(ties, 0)
        slot += tl.sum(tl.where((ties == 1) & (place == rank), slots, 0), 0)
        equal += tl.sum(ties, 0)
        if both:
            early_ties = (exists & (slots < early_end) & (keys == early_key)).to(tl.int32)
            early_place = early_equal + tl.cumsum(early_ties, 0)
            early_slot += tl.sum(tl.where((early_ties == 1) & (early_place == early_rank), slots, 0), 0)
            early_equal += tl.sum(early_ties, 0)
    key = tl.where(full, key, 0)
    slot = tl.where(full, slot, NOWHERE)
    early_key = tl.where(both, tl.where(early_full, early_key, 0), key)
    early_slot = tl.where(both, tl.where(early_full, early_slot, NOWHERE), slot)
    return early_key, early_slot, key, slot


@triton.jit
def _rank_candidates(score_ptr, mask_ptr, first, end, rows_here, key, slot, candidates, threshold_ptr, last_kept_ptr,
                     WINDOW: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Each row's last kept key among the block's candidates, which lie where the results go.

    Args are of `_select_block`; `key` and `slot` are those of the last row's last kept key.
    """
    index = tl.arange(0, ROWS)
    row_slots = first + index
    real = index < candidates
    scores = tl.load(threshold_ptr + index, mask=real, other=0.0)
    slots = tl.load(last_kept_ptr + index, mask=real, other=0)
    tl.debug_barrier()
    keys = _order_key(scores)
    # how many of the slots that a row sees outrank the last row's last kept key
    new = row_slots < end
    if MASKED:
        new = new & (tl.load(mask_ptr + row_slots, mask=new, other=0) != 0)
    new_keys = _order_key(tl.load(score_ptr + row_slots, mask=new, other=0.0))
    higher = (new & _outranks(new_keys, row_slots, key, slot)).to(tl.int32)
    above = WINDOW - 1 - (tl.sum(higher, 0) - tl.cumsum(higher, 0))
    # and how many of the candidates outrank each candidate: 0 and 1 are exact in float16, their sums in float32
    sees = real[None, :] & (slots[None, :] <= row_slots[:, None])
    beats = _outranks(keys[:, None], slots[:, None], keys[None, :], slots[None, :])
    ranks = above[:, None] + tl.dot(sees.to(tl.float16), beats.to(tl.float16)).to(tl.int32)
    hit = sees & (ranks == WINDOW - 1)
    found = tl.max(hit.to(tl.int32), 1) > 0
    threshold = tl.max(tl.where(hit, scores[None, :], float("-inf")), 1)
    last_kept = tl.max(tl.where(hit, slots[None, :], -1), 1)
    written = index < rows_here
    tl.store(threshold_ptr + index, tl.where(found, threshold, float("-inf")), mask=written)
    tl.store(last_kept_ptr + index, last_kept, mask=written)


@triton.jit
def _select_block(score_ptr, first_slot_ptr, mask_ptr, num_rows, num_slots, threshold_ptr, last_kept_ptr, kept_ptr,
                  kept_count_ptr, WINDOW: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
                  BLOCK_SLOTS: tl.constexpr):  # fmt: skip
    """One block of ROWS rows: the last kept key of each row, and the slots that any row keeps.

    The last kept key of a row never ranks lower than that of the row before (a row sees one key more). So the last kept
    keys of all rows lie between that of the first row, `early`, and that of the last one; between them are at most ROWS
    of the slots that the last row sees. A block of one row, which a decode step is, needs no candidates: its list is
    its set.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    plane = batch * tl.num_programs(1) + head
    score_ptr += plane.to(tl.int64) * num_slots
    mask_ptr += batch.to(tl.int64) * num_slots
    first_row = block * ROWS
    rows_here = tl.minimum(num_rows - first_row, ROWS)
    first = tl.load(first_slot_ptr + batch).to(tl.int32) + first_row
    end = tl.minimum(first + rows_here, num_slots)
    early_end = tl.minimum(first + 1, num_slots)
    out_row = plane.to(tl.int64) * num_rows + first_row

    early_key = tl.zeros((), tl.uint32)
    key = tl.zeros((), tl.uint32)
    early_slot = tl.full((), NOWHERE, tl.int32)
    slot = tl.full((), NOWHERE, tl.int32)
    if end > WINDOW:
        early_key, early_slot, key, slot = _last_kept(score_ptr, mask_ptr, early_end, end, WINDOW, MASKED, BLOCK_SLOTS)

    width = tl.minimum(num_slots, WINDOW + ROWS - 1)
    list_ptr = kept_ptr + (plane.to(tl.int64) * tl.num_programs(0) + block) * width
    count = tl.full((), 0, tl.int32)
    candidates = tl.full((), 0, tl.int32)
    for start in range(0, end, BLOCK_SLOTS):
        slots, keys, exists = _load_keys(score_ptr, mask_ptr, start, end, MASKED, BLOCK_SLOTS)
        kept = exists & ((keys > early_key) | ((keys == early_key) & (slots <= early_slot)))
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(list_ptr + place, slots, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
        if rows_here > 1:
            # The outputs of these rows hold the candidates for a moment: there are as many places as rows.
            among = kept & ((keys < key) | ((keys == key) & (slots >= slot)))
            place = candidates + tl.cumsum(among.to(tl.int32), 0) - 1
            score = tl.load(score_ptr + slots, mask=among, other=0.0)
            tl.store(threshold_ptr + out_row + place, score, mask=among)
            tl.store(last_kept_ptr + out_row + place, slots, mask=among)
            candidates += tl.sum(among.to(tl.int32), 0)
    tl.store(kept_count_ptr + plane.to(tl.int64) * tl.num_programs(0) + block, count)

    if rows_here == 1:
        found = slot != NOWHERE
        tl.store(threshold_ptr + out_row, tl.load(score_ptr + slot, mask=found, other=float("-inf")))
        tl.store(last_kept_ptr + out_row, tl.where(found, slot, -1))
    else:
        tl.debug_barrier()
        _rank_candidates(score_ptr, mask_ptr, first, end, rows_here, key, slot, candidates, threshold_ptr + out_row,
                         last_kept_ptr + out_row, WINDOW, ROWS, MASKED)  # fmt: skip


@triton.jit
def select_kernel(score_ptr, first_slot_ptr, query_ptr, num_rows, num_slots, threshold_ptr, last_kept_ptr, kept_ptr,
                  kept_count_ptr, WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr):  # fmt: skip
    """DynamicMaskSelect."""
    _select_block(score_ptr, first_slot_ptr, score_ptr, num_rows, num_slots, threshold_ptr, last_kept_ptr, kept_ptr,
                  kept_count_ptr, WINDOW, ROWS, False, BLOCK_SLOTS)  # fmt: skip


@triton.jit
def select_masked_kernel(score_ptr, first_slot_ptr, query_ptr, key_mask_ptr, num_rows, num_slots, threshold_ptr,
                         last_kept_ptr, kept_ptr, kept_count_ptr, WINDOW: tl.constexpr, ROWS: tl.constexpr,
                         BLOCK_SLOTS: tl.constexpr):  # fmt: skip
    """DynamicMaskSelectMasked."""
    _select_block(score_ptr, first_slot_ptr, key_mask_ptr, num_rows, num_slots, threshold_ptr, last_kept_ptr, kept_ptr,
                  kept_count_ptr, WINDOW, ROWS, True, BLOCK_SLOTS)  # fmt: skip
