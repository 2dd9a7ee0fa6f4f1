"""How much memory a Doge takes while it runs.

Weights and caches are exact. Activations are an upper estimate: of the longest prefill that is computed at once, whose
attention runs as several kernels.

Axes: B batch, Q tokens of a prefill call, L tokens of a row, H heads, Hkv key/value heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from doge_deploy.checkpoint.names import EMBEDDING, expected_tensors
from doge_deploy.config.model import DogeFacts
from doge_deploy.dtypes import item_bytes
from doge_deploy.graph.decode_traffic import is_gathered, tensor_bytes
from doge_deploy.graph.weight_formats import WeightFormat
from doge_deploy.targets.deployment import Held


@dataclass(frozen=True)
class Needs:
    """Bytes, all at the same time."""

    weight_bytes: int
    cache_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


def needs(
    facts: DogeFacts,
    dtype: str,
    *,
    batch_size: int,
    max_length: int,
    last_logits: bool = True,
    weight_format: WeightFormat | None = None,
    held: Held | None = None,
) -> Needs:
    """What a static-cache Doge takes.

    Args:
        facts: the model.
        dtype: fp32, fp16 or bf16; scores are fp32 in all of them.
        batch_size: B.
        max_length: L.
        last_logits: logits of one token per row.
        weight_format: how matrices are stored; None for `dtype`.
        held: what the backend holds; rows of L slots, and a prefill of L tokens, where None.
    """
    held = held or Held(slots=max_length, longest_call=max_length)
    row = row_cache_bytes(facts, dtype, held.slots, score_numbers=held.score_numbers)
    return Needs(
        held.networks * (weight_bytes(facts, dtype, weight_format) + angle_bytes(facts, dtype, max_length)),
        held.caches * batch_size * row,
        activation_bytes(
            facts,
            dtype,
            batch_size=batch_size,
            tokens=held.longest_call,
            keys=held.keys or held.slots,
            last=last_logits,
        ),
    )


def weight_bytes(facts: DogeFacts, dtype: str, weight_format: WeightFormat | None = None) -> int:
    """Every tensor once; a tied embedding twice, since a runtime lays the head out in its own way."""
    shapes = expected_tensors(facts)

    def nbytes(name: str, *, gathered: bool) -> int:
        return tensor_bytes(name, shapes[name], dtype=dtype, weight_format=weight_format, gathered=gathered)

    total = sum(nbytes(name, gathered=is_gathered(name, facts)) for name in shapes)
    return total + (nbytes(EMBEDDING, gathered=True) if facts.tie_word_embeddings else 0)


def angle_bytes(facts: DogeFacts, dtype: str, max_length: int) -> int:
    """The tables that positions are rotated by; float32 where angles change with the text."""
    numbers = sum(map(math.prod, facts.rope_shapes(max_length).values()))
    return numbers * item_bytes("fp32" if facts.rope_changes(max_length) else dtype)


def row_cache_bytes(facts: DogeFacts, dtype: str, length: int, *, score_numbers: int = 1) -> int:
    """Key, value and score of one row of `length` slots, all layers; `score_numbers` float32 numbers in place of one
    score.
    """
    per_slot = facts.num_key_value_heads * 2 * facts.head_dim * item_bytes(dtype)
    per_slot += facts.num_score_heads * score_numbers * item_bytes("fp32")
    return facts.num_hidden_layers * length * per_slot


def activation_bytes(facts: DogeFacts, dtype: str, *, batch_size: int, tokens: int, keys: int, last: bool) -> int:
    """An upper estimate of what one layer and the head hold at once.

    The residual stream with its norms, projections of the widest part, the mask `[B, Hkv, Q, K]` in fp32 and in the
    model's dtype, scores and weights of attention `[B, H, Q, K]` in fp32, the rows of both expert tables that a call
    looks up, and the logits.
    """
    item, n = item_bytes(dtype), batch_size * tokens
    stream = n * 4 * facts.hidden_size * item
    square = batch_size * tokens * keys
    attention = square * (facts.num_key_value_heads * (4 + item) + facts.num_attention_heads * 2 * 4)
    attention += n * (facts.num_attention_heads + 2 * facts.num_key_value_heads) * facts.head_dim * item
    mlp = n * 3 * facts.intermediate_size * item
    if facts.is_moe:
        mlp += n * facts.num_experts_per_tok * 2 * facts.hidden_size * item
    logits = (batch_size if last else n) * facts.vocab_size * 4
    return stream + max(attention, mlp) + logits
