"""How large the inputs of a model's products become on some text: what scales of rounded inputs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from doge_deploy.checkpoint import Checkpoint
from doge_deploy.checkpoint.names import EMBEDDING
from doge_deploy.graph.calibration import Calibration


def input_ranges(checkpoint: Checkpoint, ids: Sequence[int], *, routing: str, max_length: int) -> dict[str, float]:
    """By name of a linear layer's weight, the head's too, the largest magnitude that its input has.

    The model runs in float32, with all of its weights in memory. Arguments: see `Calibration`.
    """
    run = Calibration(checkpoint, ids, routing=routing, max_length=max_length, dtype=torch.float32)
    model = run.model
    weights = {name: checkpoint.read(name).to(tensor.dtype) for name, tensor in model.named_parameters()}
    model.load_state_dict({**dict(model.named_buffers()), **weights}, assign=True)
    found: dict[str, float] = {}

    def note(weight: str, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        found[weight] = max(found.get(weight, 0.0), float(inputs[0].abs().max()))

    hooks = [
        module.register_forward_pre_hook(partial(note, f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if checkpoint.facts.tie_word_embeddings:
        hooks.append(
            model.model.norm.register_forward_hook(lambda module, _, output: note(EMBEDDING, module, (output,)))
        )
    start = torch.zeros(1, dtype=torch.int64)
    memory = (start,) if model.rope_remembers else ()
    with torch.no_grad():
        for row in run.rows:
            model(row, start, [run.empty_cache() for _ in model.layers()], None, *memory)
    for hook in hooks:
        hook.remove()
    return found
