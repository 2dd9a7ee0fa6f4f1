"""From one row of logits to a token: the arithmetic of transformers' `generate`, in NumPy.

The steps and their order are those of `GenerationMixin._get_logits_processor`: repetition penalty, then,
where sampling is on, temperature, top-k, top-p, min-p and a draw. In front of them stand what OpenAI's interface has
and transformers has not: biases of single tokens, and the penalties of presence and frequency. The draws themselves
differ from transformers': another generator gives other random numbers for the same seed.

Reference: transformers/generation/logits_process.py; https://platform.openai.com/docs/api-reference/chat/create.
Axes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.options.generation import SamplingOptions
from doge_deploy.runtime.base import FloatArray, IntArray

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

_HIGHEST = np.finfo(np.float32).max
_LOWEST = np.finfo(np.float32).min


class Context(Sequence[int]):
    """The tokens of prompt and output so far, and which ones they are: to append a token, and to ask which there are,
    takes the same time however many there are.

    Args:
        tokens: the prompt; what is appended later is output.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._places: dict[int, int] = {}
        """Where each id stands in `distinct`."""
        self._distinct: IntArray = np.empty(64, np.int64)
        self._made: Float32Array = np.zeros(64, np.float32)
        for token in tokens:
            self._add(token)

    def append(self, token: int) -> None:
        """One more token of the output."""
        place = self._add(token)
        self._made[place] += 1

    def _add(self, token: int) -> int:
        """The place of its id."""
        self._tokens.append(token)
        known = len(self._places)
        place = self._places.setdefault(token, known)
        if place == known:
            if known == len(self._distinct):
                self._distinct = np.concatenate((self._distinct, np.empty_like(self._distinct)))
                self._made = np.concatenate((self._made, np.zeros_like(self._made)))
            self._distinct[place] = token
        return place

    @property
    def distinct(self) -> IntArray:
        """Every id that occurs, once, in the order of first occurrence, `[n]`."""
        return self._distinct[: len(self._places)]

    @property
    def made(self) -> Float32Array:
        """How often the output holds each of `distinct`, `[n]`; 0 for those of the prompt alone."""
        return self._made[: len(self._places)]

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        return self._tokens[place]


class Sampler:
    """Chooses one token after another; its random numbers run on from call to call."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options

    @cached_property
    def _random(self) -> np.random.Generator:
        return np.random.default_rng(self.options.seed)  # NumPy loads this part of itself with the first that is drawn

    @cached_property
    def _biases(self) -> tuple[IntArray, Float32Array]:
        """Token ids and what is added to their logits."""
        biases = self.options.logit_bias
        return np.array(list(biases), np.int64), np.array(list(biases.values()), np.float32)

    def pick(self, logits: FloatArray, context: Sequence[int]) -> int:
        """The next token: one of `distribution`, drawn by inverse transform sampling.

        A drawn token takes one random number, also where only one token is left: else a last bit that leaves two would
        change every token that follows.

        Args, Raises: those of `distribution`.
        """
        ids, probabilities = self.distribution(logits, context)
        if not self.options.do_sample:
            return int(ids[0])
        cumulative = np.cumsum(probabilities)
        # To the right of equals: an id of probability 0 is never drawn.
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[drawn])

    def distribution(self, logits: FloatArray, context: Sequence[int]) -> tuple[IntArray, Float64Array]:
        """The tokens that may come next.

        Args:
            logits: `[V]`, any float dtype; computed on in float32 as transformers does.
            context: the tokens of prompt and output so far, which the penalties look at. A `Context` knows which ones
                there are and which of them are output; another sequence is searched in every call, and all prompt.

        Returns:
            ids `[n]`, each 0..V-1, and their probabilities `[n]`. Without sampling n is 1: the likeliest, of
            equals the lowest id.

        Raises:
            UnsupportedModelError: the logits hold NaN or infinity, so there is no distribution.
        """
        options, scores = self.options, self.scores(logits, context)
        if not options.do_sample:
            return np.array([scores.argmax()]), np.ones(1)
        ids = top_k_ids(scores, options.top_k)  # before the temperature, which does not change the order
        # A shift does not change the distribution; with the maximum at 0 no temperature can make inf - inf.
        kept = scores[ids].astype(np.float64) - np.float64(scores.max())
        with np.errstate(over="ignore"):
            kept /= options.temperature
        if options.top_p < 1:
            likeliest = top_p_ids(kept, options.top_p)
            ids, kept = ids[likeliest], kept[likeliest]
        if options.min_p > 0:
            likely = min_p_ids(kept, options.min_p)
            ids, kept = ids[likely], kept[likely]
        return ids, softmax(kept)

    def scores(self, logits: FloatArray, context: Sequence[int]) -> Float32Array:
        """Logits `[V]` with biases and penalties, before anything is left out or drawn.

        Args, Raises: those of `distribution`.
        """
        options = self.options
        scores = np.asarray(logits, np.float32)
        require_finite(scores, len(context))
        if options.logit_bias:
            scores = add_biases(scores, *self._biases)
        if options.repetition_penalty != 1:
            scores = penalize_repetition(scores, context, options.repetition_penalty)
        if isinstance(context, Context) and (options.presence_penalty or options.frequency_penalty):
            penalties = options.presence_penalty, options.frequency_penalty
            scores = penalize_output(scores, context.distinct, context.made, *penalties)
        return scores


def require_finite(scores: Float32Array, length: int) -> None:
    """-inf is a token that is ruled out; NaN or +inf anywhere, or -inf everywhere, leaves no distribution.

    Args:
        scores: logits `[V]`.
        length: how many tokens they come after.

    Raises:
        UnsupportedModelError: there is none.
    """
    largest = scores.max()  # NaN where there is any
    if np.isfinite(largest):
        return
    name = "NaN" if np.isnan(largest) else "+inf" if largest > 0 else "-inf"
    wrong = np.flatnonzero(np.isnan(scores) if name == "NaN" else scores == largest)
    raise UnsupportedModelError(
        f"the logits after {length} tokens hold {name} at {len(wrong)} of {len(scores)}, first {wrong[0]}"
        " (finite ones are needed): the weights are damaged, or the model overflows in its dtype"
    )


def penalize_repetition(scores: Float32Array, context: Sequence[int], penalty: float) -> Float32Array:
    """Divide positive and multiply negative logits of the ids in `context` by `penalty`, each id once.

    In float32, as transformers does: greedy decoding then agrees with it to the last bit.

    Args:
        scores: `[V]`, left as it is.
        context: ids; those outside of 0..V-1 have no logit and are passed over.
        penalty: above 0, within float32.

    Reference: `RepetitionPenaltyLogitsProcessor`.
    """
    ids = context.distinct if isinstance(context, Context) else np.unique(np.asarray(context, np.int64))
    ids = ids[(ids >= 0) & (ids < len(scores))]
    factor = np.float32(penalty)
    seen = scores[ids]
    with np.errstate(over="ignore"):
        changed = np.where(seen < 0, seen * factor, seen / factor)
    # What leaves the range of float32 stays at its end: likeliest and least likely, but no infinity, of which no
    # distribution could be made. -inf is a token that is ruled out, and stays it.
    changed = np.clip(changed, np.where(seen == -np.inf, -np.inf, _LOWEST), _HIGHEST)
    penalized: Float32Array = scores.copy()
    penalized[ids] = changed
    return penalized


def add_biases(scores: Float32Array, ids: IntArray, biases: Float32Array) -> Float32Array:
    """Logits `[V]` with the `biases` `[n]` of different `ids` `[n]` added; ids from V on are passed over. `scores` is
    left as it is.
    """
    known = ids < len(scores)
    biased: Float32Array = scores.copy()
    biased[ids[known]] += biases[known]
    return biased


def penalize_output(
    scores: Float32Array, ids: IntArray, counts: Float32Array, presence: float, frequency: float
) -> Float32Array:
    """Logits `[V]` less `presence + frequency * count` of each of different `ids` `[n]` whose count is above 0; ids
    outside of 0..V-1 are passed over. `scores` is left as it is.

    Reference: https://platform.openai.com/docs/advanced-usage (frequency and presence penalties).
    """
    held = (counts > 0) & (ids >= 0) & (ids < len(scores))
    penalized: Float32Array = scores.copy()
    penalized[ids[held]] -= np.float32(presence) + np.float32(frequency) * counts[held]
    return penalized


def top_k_ids(scores: Float32Array, top_k: int) -> IntArray:
    """Ids of `scores` `[V]` that are at least the k-th largest, ascending; where `top_k` is 0 all above -inf.

    Equals of the k-th largest stay, so there may be more than k.

    Reference: `TopKLogitsWarper`.
    """
    if 0 < top_k < len(scores):
        return np.flatnonzero(scores >= np.partition(scores, -top_k)[-top_k])
    return np.flatnonzero(scores > -np.inf)


def top_p_ids(scores: Float64Array, top_p: float) -> IntArray:
    """Ids of the smallest set of likeliest `scores` `[V]` whose probability reaches `top_p`, likeliest first.

    At least one id stays. Of equals the lowest ids stay; in transformers that is unspecified (`torch.sort`).

    Reference: `TopPLogitsWarper`, which accumulates from the least likely id up, and in float32.
    """
    probabilities = softmax(scores)
    # Ids below this are all outside of the set: together they hold less than 1 - top_p. Few are left to sort.
    candidates = np.flatnonzero(probabilities >= (1 - top_p) / len(scores))
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    cumulative = np.cumsum(probabilities[order])
    return order[: np.searchsorted(cumulative, top_p, side="left") + 1]


def min_p_ids(scores: Float64Array, min_p: float) -> IntArray:
    """Ids of `scores` `[V]` whose probability is at least `min_p`, above 0, times that of the likeliest; ascending.

    Reference: `MinPLogitsWarper`.
    """
    return np.flatnonzero(scores >= scores.max() + math.log(min_p))


def softmax(scores: Float64Array) -> Float64Array:
    """Probabilities `[V]` of `scores` `[V]`; -inf becomes 0."""
    exponentials = np.exp(scores - scores.max())
    normalized: Float64Array = exponentials / exponentials.sum()
    return normalized
