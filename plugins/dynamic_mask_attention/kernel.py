"""Triton kernels of doge::DynamicMaskAttention: the attention over the keys that each row keeps.

    output = softmax(q k^T * scale + score) v        over the keys that a row sees and keeps

Two kernels stand in every chain. With few new tokens `split` walks parts of the keys in many programs and `attend`
combines them; with many, `split` has nothing to do and `attend` walks the keys itself. Each finds out on the device
which of the two it is, so one chain serves prompts and single tokens.

Reference implementation: `doge_deploy.model.attention.dynamic_mask_attention`. Which kernel takes what: `spec.py`.
Axes: B batch, H query heads, Hkv key/value heads, S score heads, D head_dim, Q rows of the call, R = min(Q,
SPLIT_ROWS), P parts, K cache slots, w keep_window_size. All tensors are contiguous.
"""

# Triton's language has its own types and reads these functions' text, so they are neither typed nor split at will.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(pointer, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[len(rows), BLOCK_D]` of a matrix with HEAD_DIM columns; zeros where a row is not valid."""
    columns = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(pointer + rows[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _step(query, key_ptr, value_ptr, scores, slots, valid, keep, maximum, total, mixed, SCALE: tl.constexpr,
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
def _packed_rows(block, head, batch, num_rows, HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr,
                 BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr):  # fmt: skip
    """Rows of a tile: for each its place in the call, its index in `[B, H, Q]`, and whether it exists.

    The tile holds BLOCK_ROWS rows of all query heads of a score head, which share its keys and values.
    """
    group: tl.constexpr = HEADS // SCORE_HEADS
    packed = tl.arange(0, BLOCK_ROWS * PACK)
    rows = block * BLOCK_ROWS + packed // PACK
    member = packed % PACK
    real = (rows < num_rows) & (member < group)
    return rows, (batch * HEADS + head * group + member).to(tl.int64) * num_rows + rows, real


@triton.jit
def _walk(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, mask_ptr, threshold_ptr, last_kept_ptr, kept_ptr,
          kept_count_ptr, num_rows, num_slots, list_width, block, head, batch, start_entry, stop_entry,
          SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr,
          HEAD_DIM: tl.constexpr, SLIDING: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
          SELECTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
          BLOCK_D: tl.constexpr):  # fmt: skip
    """Online softmax of one tile of rows over the entries from `start_entry` up to `stop_entry`.

    An entry is a slot, or with SELECTED a place in the list of the rows' block. Largest logit, sum of weights and
    weighted sum of values, for each row of `_packed_rows`.
    """
    plane = batch * SCORE_HEADS + head
    kv_plane = (batch * KV_HEADS + head // (SCORE_HEADS // KV_HEADS)).to(tl.int64)
    key_ptr += kv_plane * num_slots * HEAD_DIM
    value_ptr += kv_plane * num_slots * HEAD_DIM
    score_ptr += plane.to(tl.int64) * num_slots
    mask_ptr += batch.to(tl.int64) * num_slots
    rows, query_rows, real = _packed_rows(block, head, batch, num_rows, HEADS, SCORE_HEADS, BLOCK_ROWS, PACK)
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
        end = tl.minimum(tl.load(kept_count_ptr + list_index), stop_entry)
        for start in range(start_entry, end, BLOCK_KEYS):
            entries = start + tl.arange(0, BLOCK_KEYS)
            valid = entries < end
            slots = tl.load(kept_ptr + list_index * list_width + entries, mask=valid, other=0)
            scores = tl.load(score_ptr + slots, mask=valid, other=0.0)
            best = (scores[None, :] > threshold[:, None]) | (
                (scores[None, :] == threshold[:, None]) & (slots[None, :] <= last_kept[:, None])
            )
            keep = valid[None, :] & (slots[None, :] <= row_slots[:, None]) & best
            maximum, total, mixed = _step(query, key_ptr, value_ptr, scores[None, :], slots, valid, keep, maximum,
                                          total, mixed, SCALE, HEAD_DIM, BLOCK_D)  # fmt: skip
    else:
        end = tl.minimum(first + tl.minimum((block + 1) * BLOCK_ROWS, num_rows), tl.minimum(num_slots, stop_entry))
        if SLIDING:
            start_entry = tl.maximum(start_entry, first + block * BLOCK_ROWS - (SLIDING - 1))
        for start in range(start_entry, end, BLOCK_KEYS):
            slots = start + tl.arange(0, BLOCK_KEYS)
            valid = slots < end
            if MASKED:
                valid = valid & (tl.load(mask_ptr + slots, mask=valid, other=0) != 0)
            scores = tl.load(score_ptr + slots, mask=valid, other=0.0)
            keep = valid[None, :] & (slots[None, :] <= row_slots[:, None])
            if SLIDING:
                keep = keep & (slots[None, :] > row_slots[:, None] - SLIDING)
            maximum, total, mixed = _step(query, key_ptr, value_ptr, scores[None, :], slots, valid, keep, maximum,
                                          total, mixed, SCALE, HEAD_DIM, BLOCK_D)  # fmt: skip
    return maximum, total, mixed


@triton.jit
def _split(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, mask_ptr, threshold_ptr, last_kept_ptr, kept_ptr,
           kept_count_ptr, num_rows, num_slots, list_width, partial_ptr, maximum_ptr, total_ptr, SCALE: tl.constexpr,
           HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
           SPLIT_ROWS: tl.constexpr, SPLIT_KEYS: tl.constexpr, SLIDING: tl.constexpr, ROWS: tl.constexpr,
           MASKED: tl.constexpr, SELECTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr,
           BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One part of the keys of a tile of rows; nothing where the call has more than SPLIT_ROWS rows."""
    if num_rows <= SPLIT_ROWS:
        part = tl.program_id(0)
        block = tl.program_id(1)
        batch = tl.program_id(2) // SCORE_HEADS
        head = tl.program_id(2) % SCORE_HEADS
        maximum, total, mixed = _walk(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, mask_ptr, threshold_ptr,
                                      last_kept_ptr, kept_ptr, kept_count_ptr, num_rows, num_slots, list_width, block,
                                      head, batch, part * SPLIT_KEYS, (part + 1) * SPLIT_KEYS, SCALE, HEADS, KV_HEADS,
                                      SCORE_HEADS, HEAD_DIM, SLIDING, ROWS, MASKED, SELECTED, BLOCK_ROWS, PACK,
                                      BLOCK_KEYS, BLOCK_D)  # fmt: skip
        _, query_rows, real = _packed_rows(block, head, batch, num_rows, HEADS, SCORE_HEADS, BLOCK_ROWS, PACK)
        # Maximum and total apart, not their log-sum-exp: a float32 logarithm near 20 would cost a weight 1e-6 of it.
        out_rows = query_rows * tl.num_programs(0) + part
        tl.store(maximum_ptr + out_rows, maximum, mask=real)
        tl.store(total_ptr + out_rows, total, mask=real)
        # an empty part is not written, nor read when the parts are combined
        columns = tl.arange(0, BLOCK_D)
        tl.store(
            partial_ptr + out_rows[:, None] * HEAD_DIM + columns[None, :],
            mixed,
            mask=(real & (total > 0))[:, None] & (columns < HEAD_DIM)[None, :],
        )


@triton.jit
def _combine(partial_ptr, maximum_ptr, total_ptr, output_ptr, index, num_parts, HEAD_DIM: tl.constexpr,
             BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One row of one head: its parts weighed by exp(maximum)."""
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


@triton.jit
def _attend(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, mask_ptr, threshold_ptr, last_kept_ptr, kept_ptr,
            kept_count_ptr, partial_ptr, maximum_ptr, total_ptr, num_rows, num_slots, list_width, num_parts, output_ptr,
            SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr,
            HEAD_DIM: tl.constexpr, SPLIT_ROWS: tl.constexpr, SLIDING: tl.constexpr, ROWS: tl.constexpr,
            MASKED: tl.constexpr, SELECTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr,
            BLOCK_KEYS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """BLOCK_ROWS rows: of the query head of this program combined, or of a score head's query heads attended."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    if num_rows <= SPLIT_ROWS:
        for row in range(block * BLOCK_ROWS, tl.minimum((block + 1) * BLOCK_ROWS, num_rows)):
            index = (batch * HEADS + head).to(tl.int64) * num_rows + row
            _combine(partial_ptr, maximum_ptr, total_ptr, output_ptr, index, num_parts, HEAD_DIM, BLOCK_PARTS, BLOCK_D)
    elif head < SCORE_HEADS:
        _, total, mixed = _walk(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, mask_ptr, threshold_ptr,
                                last_kept_ptr, kept_ptr, kept_count_ptr, num_rows, num_slots, list_width, block, head,
                                batch, 0, num_slots, SCALE, HEADS, KV_HEADS, SCORE_HEADS, HEAD_DIM, SLIDING, ROWS,
                                MASKED, SELECTED, BLOCK_ROWS, PACK, BLOCK_KEYS, BLOCK_D)  # fmt: skip
        _, query_rows, real = _packed_rows(block, head, batch, num_rows, HEADS, SCORE_HEADS, BLOCK_ROWS, PACK)
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
        columns = tl.arange(0, BLOCK_D)
        tl.store(
            output_ptr + query_rows[:, None] * HEAD_DIM + columns[None, :],
            mixed.to(output_ptr.dtype.element_ty),
            mask=real[:, None] & (columns < HEAD_DIM)[None, :],
        )


@triton.jit
def split_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, num_rows, num_slots, partial_ptr,
                 maximum_ptr, total_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
                 SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT_ROWS: tl.constexpr, SPLIT_KEYS: tl.constexpr,
                 SLIDING: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskSplit."""
    _split(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, score_ptr, score_ptr, score_ptr, score_ptr,
           score_ptr, num_rows, num_slots, 0, partial_ptr, maximum_ptr, total_ptr, SCALE, HEADS, KV_HEADS, SCORE_HEADS,
           HEAD_DIM, SPLIT_ROWS, SPLIT_KEYS, SLIDING, 1, False, False, BLOCK_ROWS, PACK, BLOCK_KEYS,
           BLOCK_D)  # fmt: skip


@triton.jit
def split_masked_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, key_mask_ptr, num_rows, num_slots,
                        partial_ptr, maximum_ptr, total_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr,
                        KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                        SPLIT_ROWS: tl.constexpr, SPLIT_KEYS: tl.constexpr, SLIDING: tl.constexpr,
                        BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                        BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskSplitMasked."""
    _split(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, key_mask_ptr, score_ptr, score_ptr, score_ptr,
           score_ptr, num_rows, num_slots, 0, partial_ptr, maximum_ptr, total_ptr, SCALE, HEADS, KV_HEADS, SCORE_HEADS,
           HEAD_DIM, SPLIT_ROWS, SPLIT_KEYS, SLIDING, 1, True, False, BLOCK_ROWS, PACK, BLOCK_KEYS,
           BLOCK_D)  # fmt: skip


@triton.jit
def split_selected_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, threshold_ptr, last_kept_ptr,
                          kept_ptr, kept_count_ptr, num_rows, num_slots, list_width, partial_ptr, maximum_ptr,
                          total_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
                          SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT_ROWS: tl.constexpr,
                          SPLIT_KEYS: tl.constexpr, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr,
                          BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskSplitSelected."""
    _split(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, score_ptr, threshold_ptr, last_kept_ptr, kept_ptr,
           kept_count_ptr, num_rows, num_slots, list_width, partial_ptr, maximum_ptr, total_ptr, SCALE, HEADS, KV_HEADS,
           SCORE_HEADS, HEAD_DIM, SPLIT_ROWS, SPLIT_KEYS, 0, ROWS, False, True, BLOCK_ROWS, PACK, BLOCK_KEYS,
           BLOCK_D)  # fmt: skip


@triton.jit
def attend_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, partial_ptr, maximum_ptr, total_ptr,
                  num_rows, num_slots, num_parts, output_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr,
                  KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT_ROWS: tl.constexpr,
                  SLIDING: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                  BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskAttend."""
    _attend(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, score_ptr, score_ptr, score_ptr, score_ptr,
            score_ptr, partial_ptr, maximum_ptr, total_ptr, num_rows, num_slots, 0, num_parts, output_ptr, SCALE, HEADS,
            KV_HEADS, SCORE_HEADS, HEAD_DIM, SPLIT_ROWS, SLIDING, 1, False, False, BLOCK_ROWS, PACK, BLOCK_KEYS,
            BLOCK_PARTS, BLOCK_D)  # fmt: skip


@triton.jit
def attend_masked_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, key_mask_ptr, partial_ptr,
                         maximum_ptr, total_ptr, num_rows, num_slots, num_parts, output_ptr, SCALE: tl.constexpr,
                         HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                         SPLIT_ROWS: tl.constexpr, SLIDING: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr,
                         BLOCK_KEYS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskAttendMasked."""
    _attend(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, key_mask_ptr, score_ptr, score_ptr, score_ptr,
            score_ptr, partial_ptr, maximum_ptr, total_ptr, num_rows, num_slots, 0, num_parts, output_ptr, SCALE, HEADS,
            KV_HEADS, SCORE_HEADS, HEAD_DIM, SPLIT_ROWS, SLIDING, 1, True, False, BLOCK_ROWS, PACK, BLOCK_KEYS,
            BLOCK_PARTS, BLOCK_D)  # fmt: skip


@triton.jit
def attend_selected_kernel(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, threshold_ptr, last_kept_ptr,
                           kept_ptr, kept_count_ptr, partial_ptr, maximum_ptr, total_ptr, num_rows, num_slots,
                           list_width, num_parts, output_ptr, SCALE: tl.constexpr, HEADS: tl.constexpr,
                           KV_HEADS: tl.constexpr, SCORE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                           SPLIT_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, PACK: tl.constexpr,
                           BLOCK_KEYS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """DynamicMaskAttendSelected."""
    _attend(query_ptr, key_ptr, value_ptr, score_ptr, first_slot_ptr, score_ptr, threshold_ptr, last_kept_ptr, kept_ptr,
            kept_count_ptr, partial_ptr, maximum_ptr, total_ptr, num_rows, num_slots, list_width, num_parts, output_ptr,
            SCALE, HEADS, KV_HEADS, SCORE_HEADS, HEAD_DIM, SPLIT_ROWS, 0, ROWS, False, True, BLOCK_ROWS, PACK,
            BLOCK_KEYS, BLOCK_PARTS, BLOCK_D)  # fmt: skip
