"""Rotary position tables, made by transformers' own module so that they are its numbers to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def rope_tables(config: Mapping[str, Any], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions 0..max_length-1: two `[max_length, D/2]` float32 tables, attention scaling included.

    `config` is the checkpoint's config.json. `max_length` must lie within the length up to which the RoPE type has no
    memory (`DogeFacts.stateless_length`); the caller checks.
    Reference: `DogeRotaryEmbedding` in transformers' modeling_doge.py, `modeling_rope_utils.py`.
    """
    from transformers import DogeConfig
    from transformers.models.doge.modeling_doge import DogeRotaryEmbedding
    from transformers.utils import logging

    # Configs were read strictly by us; transformers' remarks on them are noise here.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    rotary = DogeRotaryEmbedding(DogeConfig.from_dict(dict(config)))
    positions = torch.arange(max_length)[None]
    cos, sin = rotary(torch.empty(0, dtype=torch.float32), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
