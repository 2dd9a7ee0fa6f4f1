"""A PyTorch reference for legacy Doges, which transformers cannot load.

Only the attention differs from today's: a score per query head, neither queries nor keys normalised, and in early 2025
no key ever dropped. It is written here on its own, not with the operators of `doge_deploy.model` (which it judges), and
takes the place of transformers' attention layer; caches, causal masks, rotation and feed-forward stay transformers'.
tests/verify/test_legacy_reference.py compares it with numbers of the original code.

Axes: B batch, Q tokens of the call, K cached keys after it, H query heads, Hkv key/value heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, DogeConfig, DogeForCausalLM
from transformers.models.doge.modeling_doge import apply_rotary_pos_emb

from doge_deploy.checkpoint import Checkpoint
from doge_deploy.config.model import DogeFacts


class LegacyAttention(nn.Module):
    """Dynamic mask attention of the original SmallDoge code.

    Reference: `DogeDynamicMaskAttention` and `DogeAttention` in modeling_doge.py of SmallDoges/small-doge, revisions
    42e5a63, efdbaaa and 0e305a7.
    """

    def __init__(self, facts: DogeFacts, layer: int) -> None:
        super().__init__()
        self.facts, self.layer = facts, layer
        hidden, heads, kv_heads, size = (
            facts.hidden_size,
            facts.num_attention_heads,
            facts.num_key_value_heads,
            facts.head_dim,
        )
        bias = facts.attention_bias
        self.q_proj = nn.Linear(hidden, heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * size, bias=bias)
        self.A = nn.Parameter(torch.zeros(heads))
        self.dt_proj = nn.Linear(kv_heads * size, heads, bias=bias)
        self.o_proj = nn.Linear(heads * size, hidden, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **_unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, Q, hidden]`, `attention_mask` `[B, 1, Q, K]`, 0 where visible; returns the same shape as
        `hidden_states`, and None for the attention weights.
        """
        batch, width, _ = hidden_states.shape
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.facts.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)
        dt = self.dt_proj(value.transpose(1, 2).flatten(2))  # [B, K, H]
        score = torch.exp(self.A * F.softplus(dt)).transpose(1, 2)
        bias = self.prepare_dynamic_mask(hidden_states, score, self.facts.keep_window_size, attention_mask)
        groups = self.facts.num_key_value_groups
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        logits = query @ key.transpose(2, 3) * self.facts.head_dim**-0.5 + bias
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, width, -1)
        return self.o_proj(mixed), None

    def prepare_dynamic_mask(
        self,
        hidden_states: torch.Tensor,
        dt_states: torch.Tensor,
        keep_window_size: int,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias `[B, H, Q, K]`: the key's score, lowest where it is hidden or beyond the window not among the best.

        Named and called as transformers' own, so that `Reference` can watch it; `dt_states` is the score `[B, H, K]`.
        """
        lowest = torch.finfo(hidden_states.dtype).min
        bias = dt_states[:, :, None].expand(-1, -1, hidden_states.shape[1], -1)
        if attention_mask is not None:
            visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            bias = bias.masked_fill(~visible, lowest)
        if bias.shape[-1] > keep_window_size:
            best = bias.topk(keep_window_size, dim=-1).indices
            bias = torch.full_like(bias, lowest).scatter(-1, best, bias.gather(-1, best))
        return bias


def load_legacy_model(checkpoint: Checkpoint, dtype: torch.dtype) -> DogeForCausalLM:
    """transformers' model around `LegacyAttention`, with the checkpoint's weights in `dtype`."""
    facts = checkpoint.facts
    config = DogeConfig.from_dict(dict(checkpoint.config))
    model: DogeForCausalLM = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=dtype, attn_implementation="eager"
    )
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = LegacyAttention(facts, index)
    weights = {name: checkpoint.read(name).to(dtype) for name in checkpoint.tensors}
    if facts.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    return model
