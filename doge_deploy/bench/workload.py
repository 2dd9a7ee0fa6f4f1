"""What is timed: a prompt on top of a past, then decode steps.

Axes: B rows, T all tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from doge_deploy.runtime.base import IntArray

LEAD_IN_STEPS = 2
"""Untimed decode steps before the timed ones of a round: threads wake up, caches fill with this candidate's weights."""

FILL_CHUNK = 512
"""Tokens per call while a past is filled, which is not timed: bounds the memory of whoever fills it."""


@dataclass(frozen=True)
class Workload:
    """`past_length` tokens are there, `prompt_length` are fed in one call, then `decode_steps` one by one."""

    batch_size: int
    past_length: int
    prompt_length: int
    decode_steps: int

    @property
    def total_length(self) -> int:
        """Tokens a row holds at the end."""
        return self.past_length + self.prompt_length + LEAD_IN_STEPS + self.decode_steps

    @property
    def decode_lengths(self) -> range:
        """Keys that each timed decode step attends to, its own included."""
        return range(self.total_length - self.decode_steps + 1, self.total_length + 1)

    @property
    def name(self) -> str:
        """`batch 2, past 512, prompt 128`; batch 1 and past 0 go without saying."""
        parts = [f"batch {self.batch_size}"] if self.batch_size > 1 else []
        parts += [f"past {self.past_length}"] if self.past_length else []
        return ", ".join([*parts, f"prompt {self.prompt_length}"])

    def input_ids(self, vocab_size: int) -> IntArray:
        """Random ids `[B, T]`, the same for everyone and in every run.

        Decode steps are fed these too, not what a candidate predicts: everyone computes the same.
        """
        ids: IntArray = np.random.default_rng(0).integers(0, vocab_size, (self.batch_size, self.total_length))
        return ids
