"""A model in PyTorch and the rows of a text: `ranges` and `covariances` watch in it what products are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from doge_deploy.checkpoint import Checkpoint
from doge_deploy.graph.trace import reachable_windows
from doge_deploy.model.decoder import StaticCausalLM
from doge_deploy.model.rope import rope_tensors

ROW = 256
"""Tokens of the text that are run at once."""


class Calibration:
    """A checkpoint's model, which computes in `dtype` and has no weights yet, and the rows that it is to be run on.

    Args:
        checkpoint: a language model.
        ids: the text.
        routing: of a mixture, as in the bundle.
        max_length: slots of a row of the bundle.
        dtype: float32 or float64.
    """

    model: StaticCausalLM
    """With its tables of RoPE; the weights are on the device "meta"."""
    rows: list[torch.Tensor]
    """The text, `[1, Q]` each, Q at most `ROW` and at most `max_length`."""

    def __init__(
        self, checkpoint: Checkpoint, ids: Sequence[int], *, routing: str, max_length: int, dtype: torch.dtype
    ) -> None:
        facts, length = checkpoint.facts, min(ROW, max_length)
        with torch.device("meta"):
            self.model = StaticCausalLM(
                facts,
                max_length=length,
                windows=reachable_windows(facts, "static", length),
                routing=routing,
                last_logits=False,
                dtype=dtype,
            ).eval()
        for name, table in rope_tensors(checkpoint.config, facts, length).items():
            setattr(self.model, name, nn.Buffer(table.to(self.model.get_buffer(name).dtype)))
        self.rows = [torch.tensor([list(ids[at : at + length])]) for at in range(0, len(ids), length)]
        self._cache = (
            (1, facts.num_key_value_heads, length, facts.head_dim),
            (1, facts.num_key_value_heads, length, facts.head_dim),
            (1, facts.num_score_heads, length, 1),
        )

    def empty_cache(self) -> tuple[torch.Tensor, ...]:
        """Keys, values and scores of a layer before a row, in the dtype of the model."""
        return tuple(torch.zeros(shape, dtype=self.model.dtype) for shape in self._cache)
