"""Rotary position tables: transformers' own frequencies, and cosines that no machine or thread can change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rope_tables(config: Mapping[str, Any], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions 0..max_length-1: two `[max_length, D/2]` float32 tables, attention scaling included.

    The angles are transformers' to the last bit: its frequencies times the position, in float32. Their cosines are
    computed in float64 and rounded, one thread and no vendor library involved: the tables are the same bytes everywhere
    and always, and within an ulp of PyTorch's. (PyTorch hands large float32 tables to a library that splits them among
    threads; once its second half came out wrong.)

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
    frequencies = rotary.inv_freq.numpy()
    angles = np.outer(np.arange(max_length, dtype=np.float32), frequencies).astype(np.float64)
    scaling = np.float32(rotary.attention_scaling)
    cos, sin = (function(angles).astype(np.float32) * scaling for function in (np.cos, np.sin))
    return torch.from_numpy(cos), torch.from_numpy(sin)
