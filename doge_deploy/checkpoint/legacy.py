"""Checkpoints of the original SmallDoge code, which transformers cannot load or express.

They size `A` and `dt_proj` by query heads and do not normalise queries and keys. Until mid-2025 their
parameters had other names as well.
Reference: repository SmallDoges/small-doge, revisions 42e5a63, efdbaaa and e5a2639.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from doge_deploy.checkpoint.headers import TensorInfo
from doge_deploy.config_keys import is_integer, legacy_keys
from doge_deploy.errors import UnsupportedModelError

_OLD_NAMES = re.compile(
    r"model\.(word_embed|final_layernorm|layers\.\d+\.(pre_layernorm|pre_residual|post_layernorm|post_residual|feed_forward))\."
)
_A = re.compile(r"model\.layers\.\d+\.self_attn\.A")
_NORMS = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_norm\.weight")


def refuse_legacy(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], source: str) -> None:
    """Refuse a legacy checkpoint as what it is, before its tensors are compared with the present layout.

    Raises:
        UnsupportedModelError: the layout is legacy; the message says of which revision, and by what it shows.
    """
    # `A` is in every Doge of any age and in no other model
    if not any(_A.fullmatch(name) for name in tensors) or any(_NORMS.fullmatch(name) for name in tensors):
        return
    old_names = [name for name in tensors if _OLD_NAMES.match(name)]
    shapes = _query_sized(config, tensors)
    if not old_names and not shapes and not _heads_are_equal(config):
        return
    keys = legacy_keys(config)
    evidence = [f"config key {key}" for key in keys]
    evidence += [f"tensor {name}" for name in old_names[:3]]
    evidence += shapes[:2]
    evidence.append("no self_attn.q_norm, no self_attn.k_norm")
    revision = _revision(config, old_names, keys)
    layout = f"legacy Doge layout (original SmallDoge code, {revision})"
    raise UnsupportedModelError(f"{source}: {layout}, not supported yet: {', '.join(evidence)}")


def _query_sized(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors whose first axis is the number of query heads and should be that of key/value heads."""
    heads = config.get("num_attention_heads", 8)
    if _heads_are_equal(config) or not is_integer(heads):
        return []
    marks = [name for name in tensors if _A.fullmatch(name) or name.endswith("self_attn.dt_proj.weight")]
    return [
        f"{name} {list(tensors[name].shape)} sized by num_attention_heads={heads}"
        for name in marks
        if tensors[name].shape[:1] == (heads,)
    ]


def _heads_are_equal(config: Mapping[str, Any]) -> bool:
    kv_heads = config.get("num_key_value_heads")
    return kv_heads is None or kv_heads == config.get("num_attention_heads", 8)


def _revision(config: Mapping[str, Any], old_names: list[str], keys: list[str]) -> str:
    """The age of the code that wrote a checkpoint, as far as its keys tell."""
    if not old_names:
        return "of mid-2025, with transformers' parameter names"
    if any(key.startswith(("num_cdmoe_", "num_cdmmoe_")) for key in keys):
        return "of about February 2025"
    if "keep_window_size" in config:
        return "of about March 2025"
    return "of early 2025"
