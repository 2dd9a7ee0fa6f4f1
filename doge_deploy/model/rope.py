"""Rotary positions: transformers' own frequencies, and cosines that no machine or thread can change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from doge_deploy.config.model import DogeFacts

ROPE_TENSORS = ("rope_cos", "rope_sin", "rope_frequencies", "rope_scaling")
"""Names of everything that `rope_tensors` can give: tensors of a graph that no checkpoint has."""


def rope_tensors(config: Mapping[str, Any], facts: DogeFacts, max_length: int) -> dict[str, torch.Tensor]:
    """What a graph of `max_length` positions rotates by, float32.

    Within the length that the angles were made for: `rope_cos` and `rope_sin` `[max_length, D/2]` of positions
    0..max_length-1, attention scaling included. The angles are transformers' to the last bit: its frequencies times the
    position, in float32. Their cosines are computed in float64 and rounded, one thread and no vendor library involved:
    the tables are the same bytes everywhere and always, and within an ulp of PyTorch's. (PyTorch hands large float32
    tables to a library that splits them among threads; once its second half came out wrong.)

    Beyond it: `rope_frequencies` and `rope_scaling` `[1]`, which multiplies cosines and sines. Row i of the frequencies
    belongs to a longest text of original + i tokens for dynamic, `[max_length - original + 1, D/2]`; the two rows of
    longrope are the short and the long ones.

    Args:
        config: the checkpoint's config.json.
        facts: what was read from it.
        max_length: positions of the bundle.

    Reference: `DogeRotaryEmbedding` in transformers' modeling_doge.py, `modeling_rope_utils.py`.
    """
    if facts.rope_changes(max_length):
        rotary = _rotary(config)
        return {
            "rope_frequencies": _frequencies(rotary, facts, max_length),
            "rope_scaling": torch.tensor([float(np.float32(rotary.attention_scaling))], dtype=torch.float32),
        }
    frequencies, scaling = _first_frequencies(config, facts)
    angles = np.outer(np.arange(max_length, dtype=np.float32), frequencies).astype(np.float64)
    cos, sin = (function(angles).astype(np.float32) * np.float32(scaling) for function in (np.cos, np.sin))
    return {"rope_cos": torch.from_numpy(cos), "rope_sin": torch.from_numpy(sin)}


def _first_frequencies(config: Mapping[str, Any], facts: DogeFacts) -> tuple[npt.NDArray[np.float32], float]:
    """What `DogeRotaryEmbedding` begins with, float32 `[D/2]`, and the attention scaling.

    Its module is not asked, as long as the frequencies stay: importing transformers' model code takes seconds.
    """
    if facts.rope_type == "default":
        return default_frequencies(facts), 1.0
    if facts.rope_type == "dynamic" and facts.head_dim > 2:  # for 2 it raises, in transformers' own words
        return _frequencies_of(_dynamic_theta(facts), facts.head_dim), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[facts.rope_type](_doge_config(config))
    return frequencies.numpy(), scaling


def default_frequencies(facts: DogeFacts) -> npt.NDArray[np.float32]:
    """`theta ** (-2i / D)` for i in 0..D/2-1, float32 `[D/2]`, by the operations of transformers, in their order.

    Reference: `DogeRotaryEmbedding.compute_default_rope_parameters`; https://arxiv.org/abs/2104.09864, section 3.2.2.
    """
    return _frequencies_of(facts.rope["rope_theta"], facts.head_dim)


def _frequencies_of(theta: float, head_dim: int) -> npt.NDArray[np.float32]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies: npt.NDArray[np.float32] = (1.0 / theta**exponents).numpy()
    return frequencies


def _dynamic_theta(facts: DogeFacts) -> float:
    """The base of `dynamic` before any text is longer than the angles were made for: `rope_theta`, but for rounding.

    Reference: `_compute_dynamic_ntk_parameters` in transformers' modeling_rope_utils.py, its operations in their order.
    """
    factor, length, head_dim = facts.rope["factor"], facts.max_position_embeddings, facts.head_dim
    grown: float = ((factor * length / length) - (factor - 1)) ** (head_dim / (head_dim - 2))
    return float(facts.rope["rope_theta"] * grown)


def _doge_config(config: Mapping[str, Any]) -> Any:
    from transformers import DogeConfig
    from transformers.utils import logging

    # Configs were read strictly by us; transformers' remarks on them are noise here.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return DogeConfig.from_dict(dict(config))


def _rotary(config: Mapping[str, Any]) -> Any:
    """transformers' own module for the angles of a config."""
    from transformers.models.doge.modeling_doge import DogeRotaryEmbedding

    return DogeRotaryEmbedding(_doge_config(config))


def _frequencies(rotary: Any, facts: DogeFacts, max_length: int) -> torch.Tensor:
    """transformers' frequencies for every longest text: it is asked for each, as a model would be by a position."""
    assert facts.stateless_length is not None
    last = max_length if facts.rope_remembers(max_length) else facts.stateless_length + 1
    rows = [rotary.original_inv_freq.clone()]
    for length in range(facts.stateless_length + 1, last + 1):
        rotary(torch.empty(0), torch.tensor([[length - 1]]))
        rows.append(rotary.inv_freq.clone())
    return torch.stack(rows)
