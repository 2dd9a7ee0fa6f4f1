"""Small Doge checkpoints with random weights, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import shared_files
import torch
from transformers import DogeConfig, DogeForCausalLM, DogeForSequenceClassification, DogeModel

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "keep_window_size": 8,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SMALL_MOE: dict[str, Any] = {**SMALL, "is_moe": True, "num_experts": 20, "num_experts_per_tok": 3}

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}
"""Both for heads of 8."""


def random_doge(seed: int = 0, *, kind: type[Any] = DogeForCausalLM, **config: Any) -> Any:
    """A small Doge in eval mode; A is drawn too, which transformers initialises to zero, and so are the weights of an
    activation that has some.

    `kind`: transformers' class, that of the causal language model unless another is named.
    """
    torch.manual_seed(seed)
    model = kind(DogeConfig(**{**SMALL, **config})).eval()
    with torch.no_grad():
        for layer in getattr(model, "model", model).layers:
            layer.self_attn.A.normal_()
            for scale in (layer.input_layernorm.weight, layer.input_residual, layer.self_attn.q_norm.weight):
                scale.normal_(mean=1.0, std=0.15)
            for weight in layer.mlp.act_fn.parameters():
                weight.normal_()
            if config.get("hidden_act") == "xielu":
                layer.mlp.act_fn.beta.uniform_(0.25, 0.75)
    return model


KINDS = {
    "causal-lm": DogeForCausalLM,
    "sequence-classification": DogeForSequenceClassification,
    "features": DogeModel,
}
"""transformers' class that is made for a task."""


def save_random_doge(directory: Path, seed: int = 0, *, task: str = "causal-lm", **config: Any) -> Path:
    """Write a model for `task` as `save_pretrained` does; returns `directory`."""
    random_doge(seed, kind=KINDS[task], **config).save_pretrained(directory)
    return directory


def shared_doge(seed: int = 0, *, task: str = "causal-lm", **config: Any) -> Path:
    """What `save_random_doge` writes, made once for all tests of a session; do not write into it."""
    kind = "moe" if config.get("is_moe") else "dense"
    return shared_files.made_once(
        kind, ["doge", seed, task, config], lambda path: save_random_doge(path, seed, task=task, **config)
    )
