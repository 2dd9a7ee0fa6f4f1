"""Names that a wrapper around the model put before those of its tensors, and how they are taken off again.

DistributedDataParallel, FSDP, activation checkpointing, torch.compile, Lightning modules and PEFT each save a model's
tensors under a longer name. transformers loads none of these; here the longer name is taken off where only one reading
is possible: every tensor has it, and without it no two tensors have one name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from doge_deploy.checkpoint.headers import TensorInfo

_INNER = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Wrappers of any module of a model, each a part between dots anywhere in a name."""

_LAYER = re.compile(r"(.*?)(model\.)?layers\.0\.self_attn\.A")


def without_wrappers(tensors: Mapping[str, TensorInfo], *, bare: bool) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Tensors by the names that they have in the model itself, and what was taken off.

    Args:
        tensors: what is stored, by stored name.
        bare: the decoder was saved without a head, so that its names do not begin with `model.`.

    Returns:
        The tensors as they are, and nothing, where no wrapper is found or more than one reading is possible.
    """
    names = {name: _without_inner(name) for name in tensors}
    layers = [match for name in names.values() if (match := _LAYER.fullmatch(name))]
    if len(layers) != 1:
        return dict(tensors), ()
    prefix = layers[0][1] + ((layers[0][2] or "") if bare else "")
    if not bare and layers[0][2] is None:
        return dict(tensors), ()
    if not all(name.startswith(prefix) for name in names.values()):
        return dict(tensors), ()
    renamed = {names[name].removeprefix(prefix): info for name, info in tensors.items()}
    if len(renamed) < len(tensors) or renamed.keys() == tensors.keys():
        return dict(tensors), ()
    inner = {part for name in tensors for part in name.split(".") if part in _INNER}
    leading = [prefix] if prefix else []
    return renamed, tuple(leading + [f"{part}." for part in _INNER if part in inner])


def _without_inner(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _INNER)
