"""Logarithms of probabilities of tokens, under the logits as the model gave them.

Reference: `logprobs` of https://platform.openai.com/docs/api-reference/chat/object.  Axes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.sampling import Sampler


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, of the distribution before biases, penalties, temperature and truncation."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens, best first; of equals the lowest id first."""


def log_probabilities(logits: npt.NDArray[np.float32], token: int, top: int) -> TokenLogprobs:
    """Logprobs of `token` and of the `top` likeliest tokens under `logits` `[V]`, computed in float64."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    best: tuple[tuple[int, float], ...] = ()
    if top:
        candidates = np.argpartition(-scores, top - 1)[:top] if top < len(scores) else np.arange(len(scores))
        # argpartition may leave out a lower id among equals of the last place
        last = scores[candidates].min()
        candidates = np.flatnonzero(scores >= last)
        ordered = candidates[np.argsort(-scores[candidates], kind="stable")][:top]
        best = tuple((int(one), float(scores[one])) for one in ordered)
    return TokenLogprobs(token, float(scores[token]), best)


class RecordingSampler(Sampler):
    """Picks what another sampler picks, with that one's random numbers, and notes the logprobs of each pick."""

    def __init__(self, sampler: Sampler, top: int) -> None:
        """`top`: how many of the likeliest tokens are noted with each pick."""
        super().__init__(sampler.options)
        self._sampler, self._top = sampler, top
        self.entries: list[TokenLogprobs] = []
        """One a pick."""

    def pick(self, logits: FloatArray, context: Sequence[int]) -> int:
        """As the other sampler's."""
        token = self._sampler.pick(logits, context)
        self.entries.append(log_probabilities(np.asarray(logits, np.float32), token, self._top))
        return token
