"""A runner without a model: what it says next is a function of what it heard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from doge_deploy.runtime.base import FloatArray, IntArray, Runner


class ScriptedRunner(Runner):
    """Batch 1. `rule(history)` is the likeliest next token after the tokens of `history`."""

    def __init__(
        self, rule: Callable[[list[int]], int], *, vocab_size: int, max_length: int = 64, last: bool = True
    ) -> None:
        super().__init__(max_length=max_length, last_logits=last)
        self._rule = rule
        self._vocab_size = vocab_size
        self.history: list[int] = []
        self.calls: list[list[int]] = []
        """Ids of each call."""
        self.resets = 0

    def _reset(self, batch_size: int) -> None:
        assert batch_size == 1
        self.history = []
        self.resets += 1

    def _run(self, input_ids: IntArray, lengths: IntArray) -> FloatArray:
        assert input_ids.dtype == np.int64 and lengths.tolist() == [input_ids.shape[1]]
        self.calls.append(input_ids[0].tolist())
        logits = np.zeros((1, input_ids.shape[1], self._vocab_size), np.float32)
        for place, token in enumerate(self.calls[-1]):
            self.history.append(token)
            logits[0, place, self._rule(self.history)] = 9.0
        return logits[:, -1:] if self.last_logits else logits

    def cache(self) -> dict[str, list[FloatArray]]:
        return {}


def scripted(
    tokens: Sequence[int],
    prompt_length: int,
    *,
    vocab_size: int = 1024,
    max_length: int = 64,
    last: bool = True,
) -> ScriptedRunner:
    """A runner that answers a prompt of `prompt_length` tokens with `tokens`, the last one forever."""

    def rule(history: list[int]) -> int:
        return tokens[min(max(len(history) - prompt_length, 0), len(tokens) - 1)]

    return ScriptedRunner(rule, vocab_size=vocab_size, max_length=max_length, last=last)
