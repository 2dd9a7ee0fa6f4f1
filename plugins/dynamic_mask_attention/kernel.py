"""Triton kernels of doge::DynamicMaskAttention.

    bias[b, s, q, j] = score[b, s, j]   if slot j is visible to row q and among its w best, lowest index first
    output = softmax(q k^T * scale + bias) v        over the keys that have a bias

Slow twin: `doge_deploy.model.attention.dynamic_mask_attention`. Which kernel takes what: `spec.py`; why the selection
is built as it is: `README.md`. Axes: B batch, H query heads, Hkv key/value heads, S score heads, D head_dim, Q rows of
the call, K cache slots, w keep_window_size. All tensors are contiguous.
"""

# Triton's language has its own types and reads these functions' text, so they are neither typed nor split at will.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
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
def _last_kept(score_ptr, mask_ptr, early_end, end, WINDOW: tl.constexpr, BOTH: tl.constexpr,
               MASKED: tl.constexpr, BLOCK_SLOTS: tl.constexpr):  # fmt: skip
    """Order key and slot of the w-th best of the slots before `early_end` and of those before `end`.

    Radix select: four passes over the scores, a histogram of 256 digits each, then one to find the slot among equals.
    Key 0 and NOWHERE where there are fewer than w.
    """
    early_key = tl.zeros((), tl.uint32)
    key = tl.zeros((), tl.uint32)
    early_rank = tl.full((), WINDOW, tl.int32)
    rank = tl.full((), WINDOW, tl.int32)
    early_full = early_end > 0
    full = end > 0
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
            if BOTH:
                early_histogram += tl.histogram(digits, 256, mask=early_same)
        key, rank, found = _next_digit(histogram, key, rank)
        if step == 0:
            full = found
        if BOTH:
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
        if BOTH:
            early_ties = (exists & (slots < early_end) & (keys == early_key)).to(tl.int32)
            early_place = early_equal + tl.cumsum(early_ties, 0)
            early_slot += tl.sum(tl.where((early_ties == 1) & (early_place == early_rank), slots, 0), 0)
            early_equal += tl.sum(early_ties, 0)
    key = tl.where(full, key, 0)
    slot = tl.where(full, slot, NOWHERE)
    if BOTH:
        return tl.where(early_full, early_key, 0), tl.where(early_full, early_slot, NOWHERE), key, slot
    return key, slot, key, slot


@triton.jit
def _select_block(score_ptr, first_slot_ptr, mask_ptr, num_rows, num_slots, threshold_ptr, last_kept_ptr, kept_ptr,
                  kept_count_ptr, WINDOW: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
                  BLOCK_SLOTS: tl.constexpr):  # fmt: skip
    """One block of ROWS rows: the last kept key of each row, and the slots that any row keeps.

    The last kept key of a row never ranks lower than that of the row before (a row sees one key more). So the last kept
    keys of all rows lie between that of the first row, `early`, and that of the last one; between them are at most ROWS
    of the slots that the last row sees.
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
        early_key, early_slot, key, slot = _last_kept(
            score_ptr, mask_ptr, early_end, end, WINDOW, ROWS > 1, MASKED, BLOCK_SLOTS
        )

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
        if ROWS > 1:
            # The outputs of these rows hold the candidates for a moment: there are as many places as rows.
            among = kept & ((keys < key) | ((keys == key) & (slots >= slot)))
            place = candidates + tl.cumsum(among.to(tl.int32), 0) - 1
            score = tl.load(score_ptr + slots, mask=among, other=0.0)
            tl.store(threshold_ptr + out_row + place, score, mask=among)
            tl.store(last_kept_ptr + out_row + place, slots, mask=among)
            candidates += tl.sum(among.to(tl.int32), 0)
    tl.store(kept_count_ptr + plane.to(tl.int64) * tl.num_programs(0) + block, count)

    if ROWS == 1:
        found = slot != NOWHERE
        tl.store(threshold_ptr + out_row, tl.load(score_ptr + slot, mask=found, other=float("-inf")))
        tl.store(last_kept_ptr + out_row, tl.where(found, slot, -1))
    else:
        tl.debug_barrier()
        index = tl.arange(0, ROWS)
        row_slots = first + index
        real = index < candidates
        scores = tl.load(threshold_ptr + out_row + index, mask=real, other=0.0)
        slots = tl.load(last_kept_ptr + out_row + index, mask=real, other=0)
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
        tl.store(threshold_ptr + out_row + index, tl.where(found, threshold, float("-inf")), mask=written)
        tl.store(last_kept_ptr + out_row + index, last_kept, mask=written)


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


@triton.jit
def _load_rows(pointer, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[len(rows), BLOCK_D]` of a matrix with HEAD_DIM columns; zeros where a row is not valid."""
    columns = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(pointer + rows[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _attend(query, key_ptr, value_ptr, scores, slots, valid, keep, maximum, total, mixed, SCALE: tl.constexpr,
            HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One step of online softmax over the keys at `slots`.

    `scores` and `keep` broadcast to `[M, N]`; K and V are read where `valid`.
    """
    keys = _load_rows(key_ptr, slots, valid, HEAD_DIM, BLOCK_D)
    logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * SCALE + scores
    logits = tl.where(keep, logits, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    # nothing visible so far: -inf - -inf would be NaN
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    # to base 2 after the subtraction: scores are large, and log2(e) times a large logit would round it once more
    weights = tl.exp2((logits - shift[:, None]) * LOG2_E)
    shrink = tl.exp2((maximum - shift) * LOG2_E)
    values = _load_rows(value_ptr, slots, valid, HEAD_DIM, BLOCK_D)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
    return new_maximum, total * shrink + tl.sum(weights, 1), mixed


@triton.jit
def _prefill_block(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, mask_ptr, threshold_ptr, last_kept_ptr,
                   kept_ptr, kept_count_ptr, num_rows, num_slots, list_width, output_ptr, SCALE: tl.constexpr,
                   HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                   ROWS: tl.constexpr, MASKED: tl.constexpr, SELECTED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                   PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """BLOCK_ROWS rows of all query heads of a score head, which share its tiles of K and V."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    group: tl.constexpr = HEADS // SCORE_HEADS
    plane = batch * SCORE_HEADS + head
    kv_plane = (batch * KV_HEADS + head // (SCORE_HEADS // KV_HEADS)).to(tl.int64)
    key_ptr += kv_plane * num_slots * HEAD_DIM
    value_ptr += kv_plane * num_slots * HEAD_DIM
    score_ptr += plane.to(tl.int64) * num_slots
    mask_ptr += batch.to(tl.int64) * num_slots

    packed = tl.arange(0, BLOCK_ROWS * PACK)
    rows = block * BLOCK_ROWS + packed // PACK
    member = packed % PACK
    real = (rows < num_rows) & (member < group)
    query_rows = (batch * HEADS + head * group + member).to(tl.int64) * num_rows + rows
    query = _load_rows(query_ptr, query_rows, real, HEAD_DIM, BLOCK_D)
    first = tl.load(first_slot_ptr + batch).to(tl.int32)
    row_slots = first + rows

    maximum = tl.full((BLOCK_ROWS * PACK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS * PACK,), tl.float32)
    mixed = tl.zeros((BLOCK_ROWS * PACK, BLOCK_D), tl.float32)
    if SELECTED:
        row_index = plane.to(tl.int64) * num_rows + rows
        threshold = tl.load(threshold_ptr + row_index, mask=rows < num_rows, other=0.0)
        last_kept = tl.load(last_kept_ptr + row_index, mask=rows < num_rows, other=0)
        list_index = plane.to(tl.int64) * tl.cdiv(num_rows, ROWS) + block * BLOCK_ROWS // ROWS
        count = tl.load(kept_count_ptr + list_index)
        for start in range(0, count, BLOCK_KEYS):
            entries = start + tl.arange(0, BLOCK_KEYS)
            valid = entries < count
            slots = tl.load(kept_ptr + list_index * list_width + entries, mask=valid, other=0)
            scores = tl.load(score_ptr + slots, mask=valid, other=0.0)
            best = (scores[None, :] > threshold[:, None]) | (
                (scores[None, :] == threshold[:, None]) & (slots[None, :] <= last_kept[:, None])
            )
            keep = valid[None, :] & (slots[None, :] <= row_slots[:, None]) & best
            maximum, total, mixed = _attend(query, key_ptr, value_ptr, scores[None, :], slots, valid, keep, maximum,
                                            total, mixed, SCALE, HEAD_DIM, BLOCK_D)  # fmt: skip
    else:
        end = tl.minimum(first + tl.minimum((block + 1) * BLOCK_ROWS, num_rows), num_slots)
        for start in range(0, end, BLOCK_KEYS):
            slots = start + tl.arange(0, BLOCK_KEYS)
            valid = slots < end
            if MASKED:
                valid = valid & (tl.load(mask_ptr + slots, mask=valid, other=0) != 0)
            scores = tl.load(score_ptr + slots, mask=valid, other=0.0)
            keep = valid[None, :] & (slots[None, :] <= row_slots[:, None])
            maximum, total, mixed = _attend(query, key_ptr, value_ptr, scores[None, :], slots, valid, keep, maximum,
                                            total, mixed, SCALE, HEAD_DIM, BLOCK_D)  # fmt: skip

    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    columns = tl.arange(0, BLOCK_D)
    tl.store(
        output_ptr + query_rows[:, None] * HEAD_DIM + columns[None, :],
        mixed.to(output_ptr.dtype.element_ty),
        mask=real[:, None] & (columns < HEAD_DIM)[None, :],
    )


@triton.jit
def prefill_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, num_rows, num_slots, output_ptr,
                   SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr,
                   HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                   BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskPrefill."""
    _prefill_block(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, score_ptr, score_ptr, score_ptr, score_ptr,
                   score_ptr, num_rows, num_slots, 0, output_ptr, SCALE, HEADS, KV_HEADS, SCORE_HEADS, HEAD_DIM, 1,
                   False, False, BLOCK_ROWS, PACK, BLOCK_KEYS, BLOCK_D)  # fmt: skip


@triton.jit
def prefill_masked_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, key_mask_ptr, num_rows, num_slots,
                          output_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
                          SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                          PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskPrefillMasked."""
    _prefill_block(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, key_mask_ptr, score_ptr, score_ptr,
                   score_ptr, score_ptr, num_rows, num_slots, 0, output_ptr, SCALE, HEADS, KV_HEADS, SCORE_HEADS,
                   HEAD_DIM, 1, True, False, BLOCK_ROWS, PACK, BLOCK_KEYS, BLOCK_D)  # fmt: skip


@triton.jit
def prefill_selected_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, threshold_ptr, last_kept_ptr,
                            kept_ptr, kept_count_ptr, num_rows, num_slots, list_width, output_ptr, SCALE: tl.constexpr,
                            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr,
                            HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr,
                            BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskPrefillSelected."""
    _prefill_block(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, score_ptr, threshold_ptr, last_kept_ptr,
                   kept_ptr, kept_count_ptr, num_rows, num_slots, list_width, output_ptr, SCALE, HEADS, KV_HEADS,
                   SCORE_HEADS, HEAD_DIM, ROWS, False, True, BLOCK_ROWS, PACK, BLOCK_KEYS, BLOCK_D)  # fmt: skip


@triton.jit
def _decode_part(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, mask_ptr, kept_ptr, kept_count_ptr, num_rows,
                 num_slots, list_width, partial_ptr, maximum_ptr, total_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr,
                 KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT_KEYS: tl.constexpr,
                 MASKED: tl.constexpr, SELECTED: tl.constexpr, PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """One part of one row's keys for all query heads of a score head, which are the rows of the tile."""
    part = tl.program_id(0)
    row = tl.program_id(1)
    plane = tl.program_id(2)
    batch = plane // SCORE_HEADS
    head = plane % SCORE_HEADS
    group: tl.constexpr = HEADS // SCORE_HEADS
    kv_plane = (batch * KV_HEADS + head // (SCORE_HEADS // KV_HEADS)).to(tl.int64)
    key_ptr += kv_plane * num_slots * HEAD_DIM
    value_ptr += kv_plane * num_slots * HEAD_DIM
    score_ptr += plane.to(tl.int64) * num_slots
    mask_ptr += batch.to(tl.int64) * num_slots
    list_index = plane.to(tl.int64) * num_rows + row
    if SELECTED:
        end = tl.load(kept_count_ptr + list_index)
    else:
        end = tl.minimum(tl.load(first_slot_ptr + batch).to(tl.int32) + row + 1, num_slots)
    stop = tl.minimum(end, (part + 1) * SPLIT_KEYS)

    member = tl.arange(0, PACK)
    real = member < group
    query_rows = (batch * HEADS + head * group + member).to(tl.int64) * num_rows + row
    maximum = tl.full((PACK,), float("-inf"), tl.float32)
    total = tl.zeros((PACK,), tl.float32)
    mixed = tl.zeros((PACK, BLOCK_D), tl.float32)
    query = _load_rows(query_ptr, query_rows, real, HEAD_DIM, BLOCK_D)
    for start in range(part * SPLIT_KEYS, stop, BLOCK_KEYS):
        entries = start + tl.arange(0, BLOCK_KEYS)
        valid = entries < stop
        if SELECTED:
            slots = tl.load(kept_ptr + list_index * list_width + entries, mask=valid, other=0)
        else:
            slots = entries
            if MASKED:
                valid = valid & (tl.load(mask_ptr + slots, mask=valid, other=0) != 0)
        scores = tl.load(score_ptr + slots, mask=valid, other=0.0)
        maximum, total, mixed = _attend(query, key_ptr, value_ptr, scores[None, :], slots, valid, valid[None, :],
                                        maximum, total, mixed, SCALE, HEAD_DIM, BLOCK_D)  # fmt: skip

    # Maximum and total apart, not their log-sum-exp: a float32 logarithm near 20 would cost a weight 1e-6 of itself.
    parts = tl.num_programs(0)
    out_rows = query_rows * parts + part
    tl.store(maximum_ptr + out_rows, maximum, mask=real)
    tl.store(total_ptr + out_rows, total, mask=real)
    # an empty part is not written, nor read by the combine step
    columns = tl.arange(0, BLOCK_D)
    tl.store(
        partial_ptr + out_rows[:, None] * HEAD_DIM + columns[None, :],
        mixed,
        mask=(real & (total > 0))[:, None] & (columns < HEAD_DIM)[None, :],
    )


@triton.jit
def decode_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, num_rows, num_slots, partial_ptr,
                  maximum_ptr, total_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
                  SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT_KEYS: tl.constexpr, PACK: tl.constexpr,
                  BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskDecode."""
    _decode_part(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, score_ptr, score_ptr, score_ptr, num_rows,
                 num_slots, 0, partial_ptr, maximum_ptr, total_ptr, SCALE, HEADS, KV_HEADS, SCORE_HEADS, HEAD_DIM,
                 SPLIT_KEYS, False, False, PACK, BLOCK_KEYS, BLOCK_D)  # fmt: skip


@triton.jit
def decode_masked_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, key_mask_ptr, num_rows, num_slots,
                         partial_ptr, maximum_ptr, total_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr,
                         KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                         SPLIT_KEYS: tl.constexpr, PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                         BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskDecodeMasked."""
    _decode_part(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, key_mask_ptr, score_ptr, score_ptr, num_rows,
                 num_slots, 0, partial_ptr, maximum_ptr, total_ptr, SCALE, HEADS, KV_HEADS, SCORE_HEADS, HEAD_DIM,
                 SPLIT_KEYS, True, False, PACK, BLOCK_KEYS, BLOCK_D)  # fmt: skip


@triton.jit
def decode_selected_kernel(query_ptr, key_ptr, value_ptr, score_ptr, kept_ptr, kept_count_ptr, num_rows, num_slots,
                           list_width, partial_ptr, maximum_ptr, total_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr,
                           KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                           SPLIT_KEYS: tl.constexpr, PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                           BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskDecodeSelected."""
    _decode_part(query_ptr, key_ptr, value_ptr, score_ptr, score_ptr, score_ptr, kept_ptr, kept_count_ptr, num_rows,
                 num_slots, list_width, partial_ptr, maximum_ptr, total_ptr, SCALE, HEADS, KV_HEADS, SCORE_HEADS,
                 HEAD_DIM, SPLIT_KEYS, False, True, PACK, BLOCK_KEYS, BLOCK_D)  # fmt: skip


@triton.jit
def combine_kernel(partial_ptr, maximum_ptr, total_ptr, query_ptr, num_parts, output_ptr, HEAD_DIM: tl.constexpr,
                   BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskCombine: parts weighed by exp(maximum). One program a row of a head."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    batch = tl.program_id(2)
    index = ((batch * tl.num_programs(0) + head).to(tl.int64)) * tl.num_programs(1) + row
    columns = tl.arange(0, BLOCK_D)
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, num_parts, BLOCK_PARTS):
        parts = start + tl.arange(0, BLOCK_PARTS)
        inside = parts < num_parts
        part_total = tl.load(total_ptr + index * num_parts + parts, mask=inside, other=0.0)
        seen = inside & (part_total > 0)
        part_maximum = tl.load(maximum_ptr + index * num_parts + parts, mask=seen, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(part_maximum, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp(part_maximum - shift)
        shrink = tl.exp(maximum - shift)
        partial = tl.load(
            partial_ptr + (index * num_parts + parts)[:, None] * HEAD_DIM + columns[None, :],
            mask=seen[:, None] & (columns < HEAD_DIM)[None, :],
            other=0.0,
        )
        mixed = mixed * shrink + tl.sum(weights[:, None] * partial, 0)
        total = total * shrink + tl.sum(weights * part_total, 0)
        maximum = new_maximum
    mixed = mixed / tl.where(total > 0, total, 1.0)
    tl.store(output_ptr + index * HEAD_DIM + columns, mixed.to(output_ptr.dtype.element_ty), mask=columns < HEAD_DIM)
