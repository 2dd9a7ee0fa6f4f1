"""The decoder in its two cache layouts: what is traced.

Parameter names equal transformers', so that a weight's name in the graph is its name in the checkpoint.
Axes: B batch, Q new tokens, P past tokens, K = P + Q, L max_length, Hkv key/value heads, S heads of the score,
D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from doge_deploy.config.model import DogeFacts
from doge_deploy.model.attention import Attention, RMSNorm
from doge_deploy.model.moe import MLP
from doge_deploy.model.ops import (
    last_token,
    last_unlike,
    longest_position,
    mask_of_slots,
    no_past,
    past_slots,
    row_positions,
)

Past = Sequence[tuple[torch.Tensor, ...]]
Select = Callable[[torch.Tensor], torch.Tensor]
"""`[B, Q, C]` -> `[B, 1, C]`: the token of each row that the head needs."""
Outputs = tuple[Any, ...]
"""Logits, the caches of each layer, and `present_rope_length` where RoPE has a memory."""


@dataclass(frozen=True)
class Windows:
    """Keys that a row can lose, 0 where the bundle cannot reach the limit."""

    keep: int
    """`keep_window_size`"""
    sliding: int = 0
    """`sliding_window`"""


class DecoderLayer(nn.Module):
    """x = input_residual * x + attn(norm(x)); x = post_attention_residual * x + mlp(norm(x))."""

    def __init__(self, facts: DogeFacts, windows: Windows, routing: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(facts.hidden_size, facts.rms_norm_eps, dtype)
        self.self_attn = Attention(facts, windows.keep, windows.sliding, dtype)
        self.input_residual = nn.Parameter(torch.empty(facts.hidden_size, dtype=dtype))
        self.post_attention_layernorm = RMSNorm(facts.hidden_size, facts.rms_norm_eps, dtype)
        self.mlp = MLP(facts, routing, dtype)
        self.post_attention_residual = nn.Parameter(torch.empty(facts.hidden_size, dtype=dtype))

    def finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows attention: its output projection, the residual sums, the feed-forward network.

        `residual` `[B, Q, hidden]`, `attended` `[B, Q, H*D]` -> `[B, Q, hidden]`. Token by token, unless the routing of
        a mixture mixes those of a call.
        """
        x: torch.Tensor = self.input_residual * residual + self.self_attn.o_proj(attended)
        fed: torch.Tensor = self.mlp(self.post_attention_layernorm(x))
        return self.post_attention_residual * x + fed


class Decoder(nn.Module):
    """Embedding, layers and final norm; the part called `model.` in a checkpoint."""

    def __init__(self, facts: DogeFacts, windows: Windows, routing: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(facts.vocab_size, facts.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(facts, windows, routing, dtype) for _ in range(facts.num_hidden_layers)
        )
        self.norm = RMSNorm(facts.hidden_size, facts.rms_norm_eps, dtype)


class Doge(nn.Module):
    """Common to all layouts and tasks: the weights, the position tables and the head.

    Args:
        facts: the checkpoint.
        max_length: positions that the graph can be given.
        windows: keys that a row can lose.
        routing: "reference" or "per-token".
        last_logits: the head runs on one token per row only.
        task: "causal-lm", "sequence-classification" or "features"; which head there is.
        dtype: of weights, caches and logits; scores are float32 at least.
    """

    rope_cos: torch.Tensor
    rope_sin: torch.Tensor
    rope_frequencies: torch.Tensor
    rope_scaling: torch.Tensor

    def __init__(
        self,
        facts: DogeFacts,
        *,
        max_length: int,
        windows: Windows,
        routing: str,
        last_logits: bool,
        dtype: torch.dtype,
        task: str = "causal-lm",
    ) -> None:
        super().__init__()
        self.facts = facts
        self.windows = windows
        self.last_logits = last_logits
        self.model = Decoder(facts, windows, routing, dtype)
        self.task = task
        if task == "sequence-classification":
            self.score = nn.Linear(facts.hidden_size, cast(int, facts.num_labels), bias=False, dtype=dtype)
        elif task == "causal-lm" and not facts.tie_word_embeddings:
            self.lm_head = nn.Linear(facts.hidden_size, facts.vocab_size, bias=False, dtype=dtype)
        self.dtype = dtype
        self.rope_changes = facts.rope_changes(max_length)
        self.rope_remembers = facts.rope_remembers(max_length)
        for name, shape in facts.rope_shapes(max_length).items():
            setattr(self, name, nn.Buffer(torch.empty(shape, dtype=torch.float32 if self.rope_changes else dtype)))

    def layers(self) -> list[DecoderLayer]:
        return cast("list[DecoderLayer]", list(self.model.layers))

    def finish(
        self, layer: DecoderLayer, residual: torch.Tensor, attended: torch.Tensor, select: Select | None
    ) -> torch.Tensor:
        """What follows a layer's attention; after the last layer only the tokens that `select` leaves.

        A dense network selects before it computes: in the last layer nobody reads what it makes of other tokens. A
        mixture selects afterwards, because reference routing depends on all tokens of the call.
        """
        if select is None or layer is not self.model.layers[-1]:
            return layer.finish(residual, attended)
        if self.facts.is_moe:
            return select(layer.finish(residual, attended))
        return layer.finish(select(residual), select(attended))

    def rotation(
        self, position_ids: torch.Tensor, past_rope_length: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """cos and sin `[B, Q, D/2]` of `position_ids` `[B, Q]`, and `present_rope_length` `[1]` where RoPE remembers.

        Beyond the length that the angles were made for, all positions of a call are rotated by the frequencies of
        the longest text: that of the call for longrope, that seen so far for dynamic. A call shorter than the original
        length makes dynamic forget.
        Reference: `dynamic_rope_update` in transformers' modeling_rope_utils.py.
        """
        if not self.rope_changes:
            return F.embedding(position_ids, self.rope_cos), F.embedding(position_ids, self.rope_sin), ()
        longest = longest_position(position_ids)
        original = torch.full_like(longest, cast(int, self.facts.stateless_length))
        memory: tuple[torch.Tensor, ...] = ()
        if self.rope_remembers:
            assert past_rope_length is not None
            length = torch.where(longest < original, original, torch.maximum(past_rope_length, longest))
            memory, row = (length,), length - original
        else:
            row = (longest > original).to(torch.int64)
        angles = position_ids.unsqueeze(-1).to(torch.float32) * F.embedding(row, self.rope_frequencies)
        cos, sin = (function(angles) * self.rope_scaling for function in (torch.cos, torch.sin))
        return cos.to(self.dtype), sin.to(self.dtype), memory

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and vocabulary projection: `[B, Q, hidden]` -> `[B, Q, V]`."""
        tied = self.facts.tie_word_embeddings
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight if tied else self.lm_head.weight)


class UncachedDoge(Doge):
    """Features or classes of a text that comes in one call."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_rope_length: torch.Tensor | None = None
    ) -> Outputs:
        """`input_ids` and `attention_mask` `[B, Q]`; positions are columns, as in transformers where none are given.

        Returns the last hidden state `[B, Q, hidden]`, or logits `[B, num_labels]` of the rightmost token that is not
        the padding token.
        """
        x = self.model.embed_tokens(input_ids)
        first_slot = no_past(input_ids)
        cos, sin, memory = self.rotation(row_positions(first_slot, input_ids), past_rope_length)
        key_mask = attention_mask != 0
        select = None if self.task == "features" else self._pooled(input_ids)
        for layer in self.layers():
            attended = layer.self_attn.forward_uncached(layer.input_layernorm(x), cos, sin, first_slot, key_mask)
            x = self.finish(layer, x, attended, select)
        x = self.model.norm(x)
        return x if self.task == "features" else self.score(x).squeeze(1), *memory

    def _pooled(self, input_ids: torch.Tensor) -> Select:
        pad = self.facts.pad_token_id
        return _last if pad is None else lambda x: last_unlike(x, input_ids, pad)


class GrowingCausalLM(Doge):
    """Past tensors grow by concatenation: the convention of Hugging Face tools."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Past,
        past_rope_length: torch.Tensor | None = None,
    ) -> Outputs:
        """`attention_mask` `[B, K]`, `past_key_values` one (key, value) `[B, Hkv, P, D]` per layer.

        Returns logits `[B, Q or 1, V]` and the (key, value) `[B, Hkv, K, D]` of each layer. With a sliding window P is
        at most `sliding_window - 1`, the present is cut to as much, and the mask has a column for every token so far.
        """
        x = self.model.embed_tokens(input_ids)
        cos, sin, memory = self.rotation(position_ids, past_rope_length)
        if self.windows.sliding:
            attention_mask = mask_of_slots(attention_mask, input_ids, past_key_values[0][0])
        key_mask = attention_mask != 0
        first_slot = past_slots(input_ids, past_key_values[0][0])
        present = []
        for layer, past in zip(self.layers(), past_key_values, strict=True):
            normed = layer.input_layernorm(x)
            attended, caches = layer.self_attn.forward_growing(normed, cos, sin, first_slot, key_mask, past)
            x = self.finish(layer, x, attended, _last if self.last_logits else None)
            present.append(caches)
        return self.head(x), present, *memory


class StaticCausalLM(Doge):
    """Past tensors are buffers of `max_length` slots, written in place at `write_indices`."""

    def forward(
        self,
        input_ids: torch.Tensor,
        write_indices: torch.Tensor,
        past_key_values: Past,
        sequence_lengths: torch.Tensor | None = None,
        past_rope_length: torch.Tensor | None = None,
    ) -> Outputs:
        """`write_indices` `[B]`: tokens that row b already holds, which is also its next position.

        `past_key_values`: one (key, value, score) per layer, `[B, Hkv, L, D]`, the score `[B, S, L, 1]` float32.
        `sequence_lengths` `[B]`, with `last_logits` only: how many of the Q tokens are real; the logits are those of
        the last real one. Padding follows the real tokens; its slots are overwritten by later calls.
        """
        x = self.model.embed_tokens(input_ids)
        cos, sin, memory = self.rotation(row_positions(write_indices, input_ids), past_rope_length)
        select = None if sequence_lengths is None else lambda x: last_token(x, sequence_lengths)
        present = []
        for layer, past in zip(self.layers(), past_key_values, strict=True):
            normed = layer.input_layernorm(x)
            attended, caches = layer.self_attn.forward_static(normed, cos, sin, write_indices, past)
            x = self.finish(layer, x, attended, select)
            present.append(caches)
        return self.head(x), present, *memory


def _last(x: torch.Tensor) -> torch.Tensor:
    """The last token of each row, real everywhere where rows are padded on the left."""
    return x[:, -1:]
