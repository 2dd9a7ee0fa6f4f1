"""Dynamic mask attention: the operator and the layer around it.

Axes: B batch, H query heads, Hkv key/value heads, S heads of the score (Hkv, or H in a legacy Doge), D head_dim,
Q new tokens, K cache slots, w keep_window_size.
Reference: `DogeAttention` in transformers' modeling_doge.py; https://arxiv.org/abs/2412.11834 (dynamic mask attention).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from doge_deploy.config.model import DogeFacts
from doge_deploy.model.ops import last_slots, merge_heads, rms_norm, rotary_embedding, split_heads, tensor_scatter


def hidden_bias(dtype: torch.dtype) -> float:
    """Bias of a key that a row must not attend to.

    Half of the most negative value: adding q.k to it cannot overflow to -inf, so that not even a row without
    any visible key (padding) becomes NaN. Its softmax weight is exactly 0 wherever a key is visible.
    """
    return torch.finfo(dtype).min / 2


def keep_mask(bias: torch.Tensor, keep_window_size: int) -> torch.Tensor:
    """True for the `keep_window_size` largest entries of each row of `bias` `[..., K]`; ties go to the lowest index."""
    order = torch.sort(bias, dim=-1, descending=True, stable=True).indices[..., :keep_window_size]
    none = torch.zeros_like(bias, dtype=torch.bool)
    return none.scatter(-1, order, True)


@torch.library.custom_op("doge::dynamic_mask_attention", mutates_args=())
def dynamic_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    first_slot: torch.Tensor,
    key_mask: torch.Tensor | None,
    keep_window_size: int,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """softmax(q k^T * scale + bias) v, where `bias` is the key's score, and a key outside the row's best w is hidden.

    Args:
        query: `[B, H, Q, D]`; row q of batch b sits at cache slot `first_slot[b] + q`.
        key, value: `[B, Hkv, K, D]`, every slot of the cache.
        score: `[B, S, K, 1]` float32 or float64, one number per cached key; S divides H. float64 is ranked as float32,
            so that keys whose scores differ by rounding alone rank as equal.
        first_slot: `[B]` int64.
        key_mask: `[B, K]` bool, False for slots nobody may see (padding); None where there are none.
        keep_window_size: keys kept per row; 0 keeps all.
        scale: multiplies q k^T.
        sliding_window: a row sees its own slot and the `sliding_window - 1` before it; 0 for all before it.

    Returns:
        `[B, H, Q, D]` in the dtype of `query`.
    """
    rows = first_slot[:, None] + torch.arange(query.shape[2], device=query.device)
    columns = torch.arange(key.shape[2], device=query.device)
    visible = (columns <= rows[:, :, None])[:, None]  # [B, 1, Q, K]
    if sliding_window:
        visible = visible & (columns > rows[:, :, None] - sliding_window)[:, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    row_score = score.transpose(2, 3)  # [B, S, 1, K]
    if keep_window_size:
        lowest = torch.finfo(torch.float32).min
        ranked = torch.where(visible, row_score.to(torch.float32), lowest)
        visible = visible & keep_mask(ranked, keep_window_size)
    bias = torch.where(visible, row_score.to(query.dtype), hidden_bias(query.dtype))
    heads = query.shape[1]
    key, value, bias = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value, bias))
    logits = torch.matmul(query, key.transpose(2, 3)) * scale + bias
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = torch.softmax(logits, dim=-1, dtype=wide).to(query.dtype)
    return torch.matmul(weights, value)


@dynamic_mask_attention.register_fake
def _(query: torch.Tensor, *_others: object) -> torch.Tensor:
    return torch.empty_like(query)


class RMSNorm(nn.Module):
    """Holds the weight `[size]` of an RMSNormalization."""

    def __init__(self, size: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = rms_norm(x, self.weight, self.epsilon)
        return normed


class Attention(nn.Module):
    """The attention layer; parameter names are those of transformers' `DogeAttention`.

    Each `forward_*` ends before the output projection `o_proj`, which is the caller's: it may not need all tokens.

    `keep_window_size` and `sliding_window` are 0 where they can hide no key.
    """

    def __init__(self, facts: DogeFacts, keep_window_size: int, sliding_window: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.facts = facts
        self.keep_window_size = keep_window_size
        self.sliding_window = sliding_window
        width, kv_width = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
        bias = facts.attention_bias
        self.q_proj = nn.Linear(facts.hidden_size, width, bias=bias, dtype=dtype)
        self.k_proj = nn.Linear(facts.hidden_size, kv_width, bias=bias, dtype=dtype)
        self.v_proj = nn.Linear(facts.hidden_size, kv_width, bias=bias, dtype=dtype)
        self.o_proj = nn.Linear(width, facts.hidden_size, bias=bias, dtype=dtype)
        self.q_norm, self.k_norm = (
            RMSNorm(facts.head_dim, facts.rms_norm_eps, dtype) if facts.qk_norm else nn.Identity() for _ in "qk"
        )
        # The score is exponential: float32 in every export, whatever the rest is.
        wide = torch.promote_types(dtype, torch.float32)
        self.A = nn.Parameter(torch.empty(facts.num_score_heads, dtype=wide))
        self.dt_proj = nn.Linear(kv_width, facts.num_score_heads, bias=bias, dtype=wide)

    def score(self, value: torch.Tensor) -> torch.Tensor:
        """exp(A * softplus(dt_proj(value))): `[B, Q, Hkv*D]` in any dtype -> `[B, S, Q, 1]` float32; in a model of
        float64, float64.
        """
        dt = self.dt_proj(value.to(self.dt_proj.weight.dtype))
        return torch.exp(self.A * F.softplus(dt)).transpose(1, 2).unsqueeze(-1)

    def project(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query `[B, H, Q, D]` and key `[B, Hkv, Q, D]`, normalised if the revision does, and rotated; value
        `[B, Q, Hkv*D]`.
        """
        query = self.q_norm(split_heads(self.q_proj(x), self.facts.num_attention_heads)).transpose(1, 2)
        key = self.k_norm(split_heads(self.k_proj(x), self.facts.num_key_value_heads)).transpose(1, 2)
        return rotary_embedding(query, cos, sin), rotary_embedding(key, cos, sin), self.v_proj(x)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        score: torch.Tensor,
        first_slot: torch.Tensor,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The operator, heads merged: -> `[B, Q, H*D]`."""
        scale = self.facts.head_dim**-0.5
        mixed = dynamic_mask_attention(
            query, key, value, score, first_slot, key_mask, self.keep_window_size, scale, self.sliding_window
        )
        merged: torch.Tensor = merge_heads(mixed.transpose(1, 2))
        return merged

    def forward_uncached(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, first_slot: torch.Tensor, key_mask: torch.Tensor
    ) -> torch.Tensor:
        """A whole text in one call; `first_slot` is 0 in every row."""
        query, key, value = self.project(x, cos, sin)
        heads = split_heads(value, self.facts.num_key_value_heads).transpose(1, 2)
        return self.attend(query, key, heads, self.score(value), first_slot, key_mask)

    def forward_growing(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        first_slot: torch.Tensor,
        key_mask: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """`past` is (key, value) `[B, Hkv, P, D]`; returns the output and the concatenated (key, value), of which a
        sliding cache keeps the last `sliding_window - 1`.
        """
        query, key, value = self.project(x, cos, sin)
        key = torch.cat((past[0], key), dim=2)
        value = torch.cat((past[1], split_heads(value, self.facts.num_key_value_heads).transpose(1, 2)), dim=2)
        score = self.score(merge_heads(value.transpose(1, 2)))
        attended = self.attend(query, key, value, score, first_slot, key_mask)
        if self.sliding_window:
            key, value = (last_slots(t, self.sliding_window - 1) for t in (key, value))
        return attended, (key, value)

    def forward_static(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        first_slot: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """`past` is (key, value, score) buffers of fixed capacity; returns the output and the three written ones."""
        query, key, value = self.project(x, cos, sin)
        heads = split_heads(value, self.facts.num_key_value_heads).transpose(1, 2)
        keys, values, scores = (
            tensor_scatter(cache, update, first_slot)
            for cache, update in zip(past, (key, heads, self.score(value)), strict=True)
        )
        return self.attend(query, keys, values, scores, first_slot, None), (keys, values, scores)
