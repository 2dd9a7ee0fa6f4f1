"""The kernels behind PyTorch's own operators `doge::dynamic_mask_attention` and `doge::cdmoe`.

Those are `torch.library` custom operators with fake implementations (`doge_deploy.model`), and their bodies are the
reference implementations. Here the same operators get a second body, a chain of kernels, which takes over while
`kernels_in_torch` is active: on a CUDA device, or on the CPU in Triton's interpreter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from doge_deploy.errors import MissingDependencyError
from doge_deploy.kernels.launch import require_launcher, run_operator
from doge_deploy.kernels.registry import GROUP, Registry, installed
from doge_deploy.kernels.spec import OperatorPlugin
from doge_deploy.model.attention import dynamic_mask_attention
from doge_deploy.model.moe import cdmoe

DEVICES = ("cuda", "cpu")

Watcher = Callable[[str, torch.Tensor], None]
"""Told what a node selected: `kept` `[B, S, Q, K]` bool where keys are selected, `experts` `[N, k]` int64."""

DOMAIN = "doge"

_watchers: list[Watcher] = []


@cache
def _registry() -> Registry:
    return installed()


def _plugin(name: str) -> OperatorPlugin:
    """The chain of kernels of a `doge` operator.

    Raises:
        MissingDependencyError: no package brings one.
    """
    plugin = _registry().operator(DOMAIN, name)
    if plugin is None:
        known = ", ".join(operator for _, operator in _registry().operators) or "none"
        raise MissingDependencyError(
            f"no plugin for {DOMAIN}::{name} is installed (entry points {GROUP!r}: {known}): install doge-deploy "
            "again, it brings that plugin; or verify with another --backend"
        )
    return plugin


def _node(arguments: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Arguments of PyTorch's operator as inputs and attributes of the graph's: tensors are inputs, a list of them
    `name_0`, `name_1` and so on, one that is None an input that is absent; the rest are attributes.
    """
    inputs: dict[str, torch.Tensor] = {}
    attributes: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            inputs[name] = value
        elif isinstance(value, (list, tuple)):
            inputs |= {f"{name}_{index}": tensor for index, tensor in enumerate(value)}
        elif value is not None:
            attributes[_ATTRIBUTES.get(name, name)] = int(value) if isinstance(value, bool) else value
    return inputs, attributes


_ATTRIBUTES = {"hidden_act": "activation"}
"""Arguments that the graph's operator has under another name."""


def _tell_kept(inputs: Mapping[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    if _watchers and "threshold" in values:
        kept = kept_keys(values, inputs.get("key_mask"))
        for watcher in _watchers:
            watcher("kept", kept)


def _tell_experts(_inputs: Mapping[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for watcher in _watchers:
        watcher("experts", values["expert_ids"].flatten(0, 1).long())


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


@dataclass(frozen=True)
class _Body:
    """A body by kernels for one of PyTorch's operators."""

    definition: Any
    """A `torch.library` custom operator."""
    plugin: str
    """Name of the graph's operator."""
    tell: Callable[[Mapping[str, torch.Tensor], dict[str, torch.Tensor]], None]
    """Tells the watchers what a node selected, from its inputs and the values of its chain."""

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        bound = inspect.signature(self.definition._init_fn).bind(*arguments, **named)
        bound.apply_defaults()
        inputs, attributes = _node(bound.arguments)
        values = run_operator(_plugin(self.plugin), inputs, attributes)
        self.tell(inputs, values)
        return values["output"]


_BODIES = (
    _Body(dynamic_mask_attention, "DynamicMaskAttention", _tell_kept),
    _Body(cdmoe, "CDMoE", _tell_experts),
)

_asleep = ExitStack()
"""Never closed: it holds the kernels disabled outside of `kernels_in_torch`."""

for _body in _BODIES:
    for _device in DEVICES:
        _body.definition.register_kernel(_device, _body)
        _asleep.enter_context(_body.definition.set_kernel_enabled(_device, False))


@contextmanager
def kernels_in_torch(device: str, watcher: Watcher | None = None) -> Iterator[None]:
    """Let the `doge` operators of PyTorch run as kernels on tensors of a device type.

    Args:
        device: "cuda", or "cpu" in Triton's interpreter.
        watcher: told what every node selects, in the order of the nodes.

    Raises:
        MissingDependencyError: an operator's plugin is not installed; or see `require_launcher`.
    """
    require_launcher(device)
    for body in _BODIES:
        _plugin(body.plugin)
    with ExitStack() as stack:
        for body in _BODIES:
            stack.enter_context(body.definition.set_kernel_enabled(device, True))
        if watcher is not None:
            _watchers.append(watcher)
            stack.callback(_watchers.remove, watcher)
        yield
