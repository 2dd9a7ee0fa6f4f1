"""How large the inputs of a model's products become on some text: what scales of rounded inputs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from doge_deploy.checkpoint import Checkpoint
from doge_deploy.graph.trace import reachable_windows
from doge_deploy.model.decoder import StaticCausalLM
from doge_deploy.model.rope import rope_tensors

ROW = 256
"""Tokens of the text that are run at once."""


def input_ranges(checkpoint: Checkpoint, ids: Sequence[int], *, routing: str, max_length: int) -> dict[str, float]:
    """By name of a linear layer's weight, the head's too, the largest magnitude that its input has.

    The model runs in float32, in PyTorch, with all of its weights in memory.

    Args:
        checkpoint: a language model.
        ids: the text; it is cut into rows that the bundle holds.
        routing: of a mixture, as in the bundle.
        max_length: slots of a row of the bundle.
    """
    facts = checkpoint.facts
    length = min(ROW, max_length)
    with torch.device("meta"):
        model = StaticCausalLM(
            facts,
            max_length=length,
            windows=reachable_windows(facts, "static", length),
            routing=routing,
            last_logits=False,
            dtype=torch.float32,
        ).eval()
    tables = rope_tensors(checkpoint.config, facts, length)
    state = {
        name: (tables[name] if name in tables else checkpoint.read(name)).to(tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    found: dict[str, float] = {}

    def note(weight: str, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        found[weight] = max(found.get(weight, 0.0), float(inputs[0].abs().max()))

    hooks = [
        module.register_forward_pre_hook(partial(note, f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if facts.tie_word_embeddings:
        embedding = "model.embed_tokens.weight"
        hooks.append(
            model.model.norm.register_forward_hook(lambda module, _, output: note(embedding, module, (output,)))
        )
    shape = (1, facts.num_key_value_heads, length, facts.head_dim)
    score = (1, facts.num_score_heads, length, 1)
    with torch.no_grad():
        for start in range(0, len(ids), length):
            row = torch.tensor([list(ids[start : start + length])])
            past = [tuple(torch.zeros(size) for size in (shape, shape, score)) for _ in model.layers()]
            extra = (torch.zeros(1, dtype=torch.int64),) if model.rope_remembers else ()
            model(row, torch.zeros(1, dtype=torch.int64), past, None, *extra)
    for hook in hooks:
        hook.remove()
    return found
