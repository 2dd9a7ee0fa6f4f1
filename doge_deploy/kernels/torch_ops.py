"""The kernels behind PyTorch's own operators `doge::dynamic_mask_attention` and `doge::cdmoe`.

Those are `torch.library` custom operators with fake implementations (`doge_deploy.model`), and their bodies are the
slow twins. Here the same operators get a second body, a chain of kernels, which takes over while `kernels_in_torch` is
active: on a CUDA device, or on the CPU in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

from doge_deploy.kernels.launch import require_launcher, run_operator
from doge_deploy.kernels.registry import Registry, installed
from doge_deploy.kernels.spec import OperatorPlugin
from doge_deploy.model.attention import dynamic_mask_attention
from doge_deploy.model.moe import cdmoe

DEVICES = ("cuda", "cpu")

Watcher = Callable[[str, torch.Tensor], None]
"""Told what a node selected: `kept` `[B, S, Q, K]` bool where keys are selected, `experts` `[N, k]` int64."""

_watchers: list[Watcher] = []


@cache
def _registry() -> Registry:
    return installed()


def _operator(name: str) -> OperatorPlugin:
    operator = _registry().operator("doge", name)
    assert operator is not None, f"doge::{name} has no plugin"  # ours is installed with this package
    return operator


def _attention_by_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    first_slot: torch.Tensor,
    key_mask: torch.Tensor | None,
    keep_window_size: int,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    inputs = {"query": query, "key": key, "value": value, "score": score, "first_slot": first_slot}
    if key_mask is not None:
        inputs["key_mask"] = key_mask
    attributes = {"keep_window_size": keep_window_size, "scale": scale, "sliding_window": sliding_window}
    values = run_operator(_operator("DynamicMaskAttention"), inputs, attributes)
    if _watchers and "threshold" in values:
        kept = kept_keys(values, key_mask)
        for watcher in _watchers:
            watcher("kept", kept)
    return values["output"]


def kept_keys(values: dict[str, torch.Tensor], key_mask: torch.Tensor | None) -> torch.Tensor:
    """`[B, S, Q, K]` bool: the keys that each row keeps, from the values of a chain with a window."""
    score = values["score"].transpose(2, 3)
    slots = torch.arange(score.shape[-1], device=score.device)
    rows = torch.arange(values["threshold"].shape[2], device=score.device)
    threshold, last_kept = values["threshold"][..., None], values["last_kept"][..., None]
    best = (score > threshold) | ((score == threshold) & (slots <= last_kept))
    visible = (slots <= (values["first_slot"][:, None] + rows)[:, :, None])[:, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    return best & visible


def _cdmoe_by_kernels(
    hidden: torch.Tensor,
    router_logits: torch.Tensor,
    down_embed: torch.Tensor,
    up_embed: torch.Tensor,
    act_fn: Sequence[torch.Tensor],
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routing: str,
    hidden_act: str,
) -> torch.Tensor:
    inputs = {"hidden": hidden, "router_logits": router_logits, "down_embed": down_embed, "up_embed": up_embed}
    inputs |= {f"act_fn_{index}": weight for index, weight in enumerate(act_fn)}
    attributes: dict[str, Any] = {
        "num_experts_per_tok": num_experts_per_tok,
        "norm_topk_prob": int(norm_topk_prob),
        "routing": routing,
        "activation": hidden_act,
    }
    values = run_operator(_operator("CDMoE"), inputs, attributes)
    for watcher in _watchers:
        watcher("experts", values["expert_ids"].flatten(0, 1).long())
    return values["output"]


_BODIES = ((dynamic_mask_attention, _attention_by_kernels), (cdmoe, _cdmoe_by_kernels))

_asleep = ExitStack()
"""Never closed: it holds the kernels disabled outside of `kernels_in_torch`."""

for _operator_definition, _body in _BODIES:
    for _device in DEVICES:
        _operator_definition.register_kernel(_device, _body)
        _asleep.enter_context(_operator_definition.set_kernel_enabled(_device, False))


@contextmanager
def kernels_in_torch(device: str, watcher: Watcher | None = None) -> Iterator[None]:
    """Let the `doge` operators of PyTorch run as kernels on tensors of a device type.

    Args:
        device: "cuda", or "cpu" in Triton's interpreter.
        watcher: told what every node selects, in the order of the nodes.

    Raises:
        MissingDependencyError: see `require_launcher`.
    """
    require_launcher(device)
    with ExitStack() as stack:
        for operator, _ in _BODIES:
            stack.enter_context(operator.set_kernel_enabled(device, True))
        if watcher is not None:
            _watchers.append(watcher)
            stack.callback(_watchers.remove, watcher)
        yield
