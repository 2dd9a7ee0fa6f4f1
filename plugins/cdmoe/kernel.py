"""Triton kernels of doge::CDMoE.

    ids, weights = the k best sums x[i] + y[j] of a token's two halves, and their softmax
    output = sum over those experts e of act(h . down_embed[e]) * weight_e * up_embed[e]

Reference implementations: `doge_deploy.model.moe.route` and `cdmoe`. Axes: N tokens of the call, C hidden, n keys per
half, E experts, k experts per token. All tensors are contiguous.
"""

# Triton's language has its own types and reads these functions' text, so they are neither typed nor split at will.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _signed_order(score):
    """int64 in the order of float32 scores, in the range of int32; -0 equals 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _signed_score(order):
    """The float32 score of `_signed_order`."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _sorted_half(pointer, KEYS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Scores and indices of a half, best first, among equals the lowest index first.

    Score and index are one int64, so that a sort of numbers is a stable sort of scores. What pads the half sorts last.
    """
    index = tl.arange(0, BLOCK_KEYS)
    score = tl.load(pointer + index, mask=index < KEYS, other=0.0).to(tl.float32)
    packed = (_signed_order(score) << 16) | (BLOCK_KEYS - 1 - index).to(tl.int64)
    packed = tl.sort(tl.where(index < KEYS, packed, -0x7FFFFFFFFFFFFFFF), descending=True)
    return _signed_score(packed >> 16), BLOCK_KEYS - 1 - (packed & 0xFFFF).to(tl.int32)


@triton.jit
def route_kernel(router_logits_ptr, num_tokens, expert_ids_ptr, expert_weights_ptr, TOP: tl.constexpr,
                 KEYS: tl.constexpr, NORMALISE: tl.constexpr, ROUTING: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                 BLOCK_CANDIDATES: tl.constexpr):  # fmt: skip
    """CDMoERoute, one program a token.

    Of all pairs of ranks only those with (i+1)*(j+1) <= k can be among the k best: rank i has k // (i+1) partners.
    Candidates are numbered in lexicographic order, in which ties are decided.
    """
    token = tl.program_id(0).to(tl.int64)
    if ROUTING == "reference":
        # the memory of [N, 2n] read as [2, N, n]: with N > 1 a token's halves come from other tokens
        x_start = token * KEYS
        y_start = (num_tokens + token) * KEYS
    else:
        x_start = token * 2 * KEYS
        y_start = x_start + KEYS
    x, x_index = _sorted_half(router_logits_ptr + x_start, KEYS, BLOCK_KEYS)
    y, y_index = _sorted_half(router_logits_ptr + y_start, KEYS, BLOCK_KEYS)

    reach: tl.constexpr = TOP if TOP < KEYS else KEYS
    candidate = tl.arange(0, BLOCK_CANDIDATES)
    rank_x = tl.zeros((BLOCK_CANDIDATES,), tl.int32)
    start = tl.zeros((BLOCK_CANDIDATES,), tl.int32)
    end = 0
    for rank in range(reach):
        end += tl.minimum(TOP // (rank + 1), KEYS)
        past = candidate >= end
        rank_x += past.to(tl.int32)
        start = tl.where(past, end, start)
    rank_y = candidate - start
    exists = rank_x < reach
    rank_x = tl.where(exists, rank_x, 0)
    rank_y = tl.where(exists, rank_y, 0)

    # rounded to the model's dtype, as the model adds: that decides which sums are equal
    total = tl.gather(x, rank_x, 0) + tl.gather(y, rank_y, 0)
    total = total.to(router_logits_ptr.dtype.element_ty).to(tl.float32)
    expert = tl.gather(x_index, rank_x, 0) * KEYS + tl.gather(y_index, rank_y, 0)
    packed = (
        (_signed_order(total) << 31) | ((BLOCK_CANDIDATES - 1 - candidate).to(tl.int64) << 20) | expert.to(tl.int64)
    )
    packed = tl.sort(tl.where(exists, packed, -0x7FFFFFFFFFFFFFFF), descending=True)

    chosen = candidate < TOP
    best = tl.where(chosen, _signed_score(packed >> 31), float("-inf"))
    weights = tl.exp(best - tl.max(best, 0))
    weights = weights / tl.sum(weights, 0)
    if NORMALISE:
        weights = weights / tl.sum(weights, 0)
    tl.store(expert_ids_ptr + token * TOP + candidate, (packed & 0xFFFFF).to(tl.int32), mask=chosen)
    tl.store(expert_weights_ptr + token * TOP + candidate, weights, mask=chosen)


@triton.jit
def _tanh(x):
    # of the absolute value: exp cannot overflow
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def _softplus(x):
    # max(x, 0) + log1p(exp(-|x|)); the logarithm of a sum that is rounded, times what the rounding cost
    decay = tl.exp(-tl.abs(x))
    sum_ = 1.0 + decay
    is_lost = sum_ == 1.0
    log = tl.where(is_lost, decay, tl.log(sum_) * (decay / tl.where(is_lost, 1.0, sum_ - 1.0)))
    return tl.maximum(x, 0.0) + log


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _tanh_gelu(x):
    return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation of that name, as in transformers, in float32. Several names are spellings of one formula."""
    if ACTIVATION == "silu" or ACTIVATION == "swish":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu" or ACTIVATION == "gelu_python":
        return _gelu(x)
    elif ACTIVATION == "gelu_10":
        return tl.minimum(tl.maximum(_gelu(x), -10.0), 10.0)
    elif (
        ACTIVATION == "gelu_new"
        or ACTIVATION == "gelu_pytorch_tanh"
        or ACTIVATION == "gelu_python_tanh"
        or ACTIVATION == "gelu_accurate"
        or ACTIVATION == "gelu_fast"
    ):
        return _tanh_gelu(x)
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "laplace":
        return 0.5 * (1.0 + tl.erf((x - 0.707107) / (0.282095 * 1.4142135623730951)))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "relu6":
        return tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x < 0, 0.01 * x, x)
    elif ACTIVATION == "hardswish":
        return x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        return _tanh(x)
    elif ACTIVATION == "mish":
        return x * _tanh(_softplus(x))
    elif ACTIVATION == "sqrtsoftplus":
        return tl.sqrt(_softplus(x))
    else:
        tl.static_assert(ACTIVATION == "linear", "unknown activation")
        return x


@triton.jit
def _mix_experts(hidden_ptr, expert_ids_ptr, expert_weights_ptr, down_embed_ptr, up_embed_ptr, down_scale_ptr,
                 up_scale_ptr, output_ptr, TOP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
                 SCALED: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr):  # fmt: skip
    """All experts of one token: once along their rows of down_embed, once along those of up_embed."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_EXPERTS)
    real = place < TOP
    ids = tl.load(expert_ids_ptr + token * TOP + place, mask=real, other=0)
    rows = ids.to(tl.int64) * HIDDEN
    dots = tl.zeros((BLOCK_EXPERTS,), tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        columns = start + tl.arange(0, BLOCK_HIDDEN)
        inside = columns < HIDDEN
        hidden = tl.load(hidden_ptr + token * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
        down = tl.load(down_embed_ptr + rows[:, None] + columns[None, :], mask=real[:, None] & inside[None, :], other=0)
        dots += tl.sum(down.to(tl.float32) * hidden[None, :], 1)
    gates = tl.load(expert_weights_ptr + token * TOP + place, mask=real, other=0.0)
    if SCALED:
        dots *= tl.load(down_scale_ptr + ids, mask=real, other=0.0)
        gates *= tl.load(up_scale_ptr + ids, mask=real, other=0.0)
    gates *= _activate(dots, ACTIVATION)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        columns = start + tl.arange(0, BLOCK_HIDDEN)
        inside = columns < HIDDEN
        up = tl.load(up_embed_ptr + rows[:, None] + columns[None, :], mask=real[:, None] & inside[None, :], other=0)
        mixed = tl.sum(up.to(tl.float32) * gates[:, None], 0)
        tl.store(output_ptr + token * HIDDEN + columns, mixed.to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit
def experts_kernel(hidden_ptr, expert_ids_ptr, expert_weights_ptr, down_embed_ptr, up_embed_ptr, output_ptr,
                   TOP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
                   BLOCK_HIDDEN: tl.constexpr):  # fmt: skip
    """CDMoEExperts."""
    _mix_experts(hidden_ptr, expert_ids_ptr, expert_weights_ptr, down_embed_ptr, up_embed_ptr, expert_weights_ptr,
                 expert_weights_ptr, output_ptr, TOP, HIDDEN, ACTIVATION, False, BLOCK_EXPERTS,
                 BLOCK_HIDDEN)  # fmt: skip


@triton.jit
def experts_int8_kernel(hidden_ptr, expert_ids_ptr, expert_weights_ptr, down_embed_ptr, up_embed_ptr, down_scale_ptr,
                        up_scale_ptr, output_ptr, TOP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
                        BLOCK_EXPERTS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr):  # fmt: skip
    """CDMoEExpertsInt8."""
    _mix_experts(hidden_ptr, expert_ids_ptr, expert_weights_ptr, down_embed_ptr, up_embed_ptr, down_scale_ptr,
                 up_scale_ptr, output_ptr, TOP, HIDDEN, ACTIVATION, True, BLOCK_EXPERTS, BLOCK_HIDDEN)  # fmt: skip
