"""Sizes of the Doges that were published, for questions that need no checkpoint.

Source: training recipes of https://github.com/SmallDoges/small-doge (vocabulary 32768, tied embeddings, head_dim 128,
keep_window_size left at transformers' default of 2048).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doge_deploy.config.model import DogeFacts
from doge_deploy.diagnostics import suggest
from doge_deploy.errors import UsageError

_BODIES = {"20M": (256, 8, 2), "60M": (512, 16, 4), "160M": (768, 24, 6), "320M": (1024, 32, 8)}
"""hidden_size, num_hidden_layers, num_attention_heads."""

_MIXTURES = {
    "20M-MoE": ("20M", 1024, 16),
    "120M-MoE": ("60M", 4096, 32),
    "480M-MoE": ("160M", 9216, 48),
    "1.4B-MoE": ("320M", 16384, 64),
}
"""The dense body, experts, experts per token."""

SIZES = (*_BODIES, *_MIXTURES)


def published_config(size: str) -> Mapping[str, Any]:
    """The config.json of a published size.

    Raises:
        UsageError: there is no such size.
    """
    if size not in SIZES:
        raise UsageError(f"{size!r} is not a published size{suggest(size, SIZES)}: {', '.join(SIZES)}")
    body, experts, per_token = _MIXTURES.get(size, (size, 0, 0))
    hidden, layers, heads = _BODIES[body]
    config: dict[str, Any] = {
        "architectures": ["DogeForCausalLM"],
        "model_type": "doge",
        "vocab_size": 32768,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "keep_window_size": 2048,
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if experts:
        config |= {"is_moe": True, "num_experts": experts, "num_experts_per_tok": per_token}
    return config


def published_facts(size: str) -> DogeFacts:
    """Facts of a published size; raises UsageError for another name."""
    return DogeFacts.from_config(published_config(size), size)
