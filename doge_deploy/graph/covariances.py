"""How the inputs of a model's products vary together on some text: by that the rounding of weights is made up for.

Everything is computed in float64, so that another processor or number of threads changes the last bits of a covariance
and none of what is rounded by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from doge_deploy.checkpoint import Checkpoint
from doge_deploy.checkpoint.names import EMBEDDING, HEAD
from doge_deploy.graph.calibration import Calibration
from doge_deploy.graph.weight_formats._base import KEPT
from doge_deploy.model.decoder import DecoderLayer

Covariances = dict[str, torch.Tensor]


def input_covariances(
    checkpoint: Checkpoint, ids: Sequence[int], *, routing: str, max_length: int
) -> Iterator[Covariances]:
    """Layer by layer, and last for the head: by name of a weight the mean of x x^T of the inputs x that it is
    multiplied with, `[C, C]` float64. Weights with one input share one tensor.

    The model runs in float64, with the weights of one layer in memory. Nobody has rounded a weight: each layer sees
    what the checkpoint's own layers before it make of the text. Keys are ranked by their scores in float32, so that
    equal tokens tie whatever their last bits are. Arguments: see `Calibration`.
    """
    run = Calibration(checkpoint, ids, routing=routing, max_length=max_length, dtype=torch.float64)
    model = run.model
    embedding = checkpoint.read(EMBEDDING)
    states = [F.embedding(row, embedding).to(torch.float64) for row in run.rows]
    start = torch.zeros(1, dtype=torch.int64)
    memory = start if model.rope_remembers else None
    with torch.no_grad():
        for index, layer in enumerate(model.layers()):
            prefix = f"model.layers.{index}."
            _load(layer, checkpoint, prefix)
            sums: Covariances = {}
            hooks = _watch(layer, prefix, sums)
            for place, state in enumerate(states):
                cos, sin, _ = model.rotation(torch.arange(state.shape[1])[None], memory)
                normed = layer.input_layernorm(state)
                attended, _ = layer.self_attn.forward_static(normed, cos, sin, start, run.empty_cache())
                states[place] = layer.finish(state, attended)
            for hook in hooks:
                hook.remove()
            layer.to("meta")
            yield _means(sums, len(ids))
        model.model.norm.weight = nn.Parameter(checkpoint.read("model.norm.weight").to(torch.float64))
        head = EMBEDDING if checkpoint.facts.tie_word_embeddings else HEAD
        normed = [model.model.norm(state) for state in states]
        yield _means({head: sum(_products(x) for x in normed)}, len(ids))  # type: ignore[dict-item]


def _load(layer: DecoderLayer, checkpoint: Checkpoint, prefix: str) -> None:
    state = {name: checkpoint.read(prefix + name).to(tensor.dtype) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _watch(layer: DecoderLayer, prefix: str, sums: Covariances) -> list[Any]:
    """Hooks that add what linear layers are given to `sums`; of those with one input the first adds for all."""
    same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    hooks = []

    def note(names: tuple[str, ...], _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        found = sums[names[0]] + _products(inputs[0]) if names[0] in sums else _products(inputs[0])
        sums.update(dict.fromkeys(names, found))

    linear = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    names = {kind: name for name in linear if (kind := name.rsplit(".", 1)[-1]) not in KEPT}
    for kind, name in names.items():
        if kind not in same:
            alike = [kind, *(other for other, first in same.items() if first == kind and other in names)]
            weights = tuple(f"{prefix}{names[other]}.weight" for other in alike)
            hooks.append(layer.get_submodule(name).register_forward_pre_hook(partial(note, weights)))
    return hooks


def _products(x: torch.Tensor) -> torch.Tensor:
    """Sum of x x^T: `[1, Q, C]` -> `[C, C]`."""
    return x[0].T @ x[0]


def _means(sums: Covariances, count: int) -> Covariances:
    shared: dict[int, torch.Tensor] = {}
    return {name: shared.setdefault(id(total), total / count) for name, total in sums.items()}
