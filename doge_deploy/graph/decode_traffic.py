"""Bytes that one decode step must read from memory: a floor that holds for every implementation.

Weights are read once, whatever the batch, in the form in which they are stored: of a weight format its numbers, scales
and the zero points that are not constant. Of a lookup table only the rows that are looked up: one row of an embedding
that is not the head too (all rows of the batch may hold the same token), one row of each RoPE table, the k routed
experts (all rows may choose the same ones). A tied embedding is the head, and as that it is read whole. The shared
experts of a mixture, its dense network, are read by every step.

Of the caches what attention needs, in every row: keys and values of the keys that stay. A dropped key never comes back,
so that its score need not be read either; only a sliding window lets a better key leave, and then the scores of all
visible keys are read. Without cached scores every visible value must be read, because scores are computed from values.

What a step writes, activations, and what an implementation reads twice are not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.bundle.signature import CACHE_KINDS
from doge_deploy.checkpoint.names import EMBEDDING, expected_tensors
from doge_deploy.config.model import DogeFacts
from doge_deploy.dtypes import item_bytes
from doge_deploy.graph.weight_formats import WeightFormat, format_of

EXPERT_TABLES = ("mlp.down_embed.weight", "mlp.up_embed.weight")
"""Ends of the names of the tables that routed experts are rows of."""


SCORE_WEIGHTS = (".self_attn.A", ".self_attn.dt_proj.")
"""Parts of the names of what scores are computed from: float32 in every graph, see `doge_deploy.model.attention`."""


@dataclass(frozen=True)
class Traffic:
    """Bytes per decode step."""

    weight_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes


def bundle_traffic(bundle: Bundle, layout: Layout, *, batch_size: int, keys: int) -> Traffic:
    """What a decode step of a bundle must read; see `decode_traffic`."""
    manifest = bundle.manifest
    return decode_traffic(
        manifest.facts,
        dtype=manifest.dtype,
        weight_format=format_of(manifest.options),
        layout=layout.signature.layout,
        max_length=manifest.max_length,
        batch_size=batch_size,
        keys=keys,
    )


def decode_traffic(
    facts: DogeFacts,
    *,
    dtype: str,
    weight_format: WeightFormat | None,
    layout: str,
    max_length: int,
    batch_size: int,
    keys: int,
) -> Traffic:
    """What a decode step must read.

    Args:
        facts: the model.
        dtype: the graph's, by either of its names.
        weight_format: how matrices are stored; None for `dtype`.
        layout: "static", whose cache has scores, or "growing".
        max_length: slots of a row, which the window and the RoPE tables depend on.
        batch_size: rows.
        keys: tokens of every row, the new one included.
    """
    weights = sum(
        _read_bytes(name, shape, facts, dtype=dtype, weight_format=weight_format)
        for name, shape in expected_tensors(facts).items()
    )
    caches = batch_size * row_traffic(facts, dtype=dtype, layout=layout, max_length=max_length, keys=keys)
    return Traffic(weights + _rope_bytes(facts, dtype, max_length), caches)


def row_traffic(facts: DogeFacts, *, dtype: str, layout: str, max_length: int, keys: int) -> int:
    """What a decode step must read of the cache of one row: all layers and heads."""
    visible = keys if facts.sliding_window is None else min(keys, facts.sliding_window)
    kept = min(visible, facts.keep_window_size) if facts.keep_window(max_length) else visible
    scored = "score" in CACHE_KINDS[layout]
    numbers = {"key": kept, "value": kept if scored else visible}
    total = sum(facts.num_key_value_heads * facts.head_dim * count for count in numbers.values()) * item_bytes(dtype)
    if scored:
        scores = visible if facts.sliding_window is not None else kept
        total += facts.num_score_heads * scores * item_bytes("float32")
    return facts.num_hidden_layers * total


def tensor_bytes(
    name: str, shape: tuple[int, ...], *, dtype: str, weight_format: WeightFormat | None, gathered: bool
) -> int:
    """Bytes of a checkpoint's tensor once a runtime has loaded it.

    Args:
        name: the checkpoint's.
        shape: its shape, or that of some of its rows.
        dtype: the graph's, by either of its names.
        weight_format: how matrices are stored; None for `dtype`.
        gathered: only rows are looked up.
    """
    if weight_format is not None and not weight_format.refusal(name, shape):
        rows, columns = shape
        return weight_format.loaded_bytes(name, (rows, columns), gathered=gathered)
    return math.prod(shape) * item_bytes("float32" if any(part in name for part in SCORE_WEIGHTS) else dtype)


def is_gathered(name: str, facts: DogeFacts) -> bool:
    """Whether only rows of a tensor are looked up: expert tables, and an embedding that is not the head too."""
    return name.endswith(EXPERT_TABLES) or (name == EMBEDDING and not facts.tie_word_embeddings)


def _read_bytes(
    name: str, shape: tuple[int, ...], facts: DogeFacts, *, dtype: str, weight_format: WeightFormat | None
) -> int:
    gathered = is_gathered(name, facts)
    if gathered:
        rows = facts.num_experts_per_tok if name.endswith(EXPERT_TABLES) else 1
        shape = (min(rows, shape[0]), *shape[1:])
    return tensor_bytes(name, shape, dtype=dtype, weight_format=weight_format, gathered=gathered)


def _rope_bytes(facts: DogeFacts, dtype: str, max_length: int) -> int:
    """A row of cosines and one of sines; beyond the original length a row of frequencies and their scaling."""
    half = facts.head_dim // 2
    if facts.rope_changes(max_length):
        return (half + 1) * item_bytes("float32")
    return 2 * half * item_bytes(dtype)
