"""One request on its way through the server: what was asked, how far it is, and where its results go.

A request is one class with a state: it is queued, its prompt is fed (prefill), its tokens are made one by one (decode),
and it is done. Only the scheduler's thread changes it after it was submitted; `cancel` goes through the scheduler too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.logprobs import TokenLogprobs, log_probabilities
from doge_deploy.runtime.sampling import Context, Sampler

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: a token or text that ends a text. `length`: `max_new_tokens`, or the row is full."""


class State(Enum):
    """How far a request is."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(frozen=True)
class Started:
    """The request has a slot; its prompt is being fed."""

    cached_tokens: int
    """Tokens of the prompt that the slot held already, or that were copied from another."""
    slot_time: float = 0.0
    """When the request got its slot, in seconds of the scheduler's clock."""


@dataclass(frozen=True)
class Produced:
    """One more token."""

    token: int
    text: str
    """What became certain of the text; empty where a character is incomplete or a stop text may have begun."""
    logprobs: TokenLogprobs | None
    first: bool = False
    """Nothing of the answer was there before."""


@dataclass(frozen=True)
class PromptScored:
    """Logarithms of the probabilities of the prompt's own tokens, for `echo` with `logprobs`."""

    entries: tuple[TokenLogprobs | None, ...]
    """One entry a token; the first has no probability."""


@dataclass(frozen=True)
class Finished:
    """Nothing more comes."""

    reason: FinishReason
    text: str = ""
    """What was withheld until it was certain."""
    error: Exception | None = None


Event = Started | Produced | PromptScored | Finished


class Text(Protocol):
    """Turns tokens into text and says when a stop text was found; see `doge_deploy.serve.text`."""

    @property
    def stopped(self) -> bool:
        """A stop text was found."""

    def push(self, token: int) -> str:
        """The text that is certain after `token`."""

    def flush(self) -> str:
        """What was withheld, at the end."""


class Constraint(Protocol):
    """Structured output: which tokens may come next; see `doge_deploy.serve.grammar`."""

    def allow(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """`logits` `[V]` with -inf at tokens that are not allowed."""

    def accept(self, token: int) -> None:
        """`token` was chosen."""

    @property
    def complete(self) -> bool:
        """Nothing may follow."""


@dataclass(eq=False)
class Request:
    """What was asked for, and the state of the answer."""

    id: str
    prompt_ids: Sequence[int]
    """At least one token."""
    sampler: Sampler
    """Of this request alone, so that its random numbers do not depend on its neighbours."""
    max_new_tokens: int
    send: Callable[[Event], None]
    """Called in the scheduler's thread with each event, in order."""
    text: Text
    eos_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    """How many of the likeliest tokens are reported with each token, 0 for its own logprob alone; None for nothing."""
    score_prompt: bool = False
    """Report the logprobs of the prompt's tokens as well."""
    constraint: Constraint | None = None
    speculate: bool = True

    state: State = State.QUEUED
    slot: int | None = None
    slot_time: float = 0.0
    """When it got the slot, in seconds of the scheduler's clock."""
    started: bool = False
    """It was looked what of the prompt is in the slots already."""
    alone: bool = False
    """Its prompt is fed in calls of its own: one with others failed."""
    fed: int = 0
    """Tokens of prompt and output that the slot holds."""
    produced: int = 0
    context: Context = field(default_factory=Context)
    """Prompt and output."""
    drafts: int = 0
    """Tokens that speculation proposed, and of those..."""
    accepted: int = 0
    """...how many were what the sampler picked."""
    prompt_scores: list[TokenLogprobs | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a request needs at least one token")
        self.context = Context(self.prompt_ids)

    @property
    def joins(self) -> bool:
        """Whether its prompt may be fed in one call with those of others."""
        return not (self.score_prompt or self.alone)

    def choose(self, logits: FloatArray) -> tuple[int, TokenLogprobs | None]:
        """The next token from `logits` `[V]`, and its logprobs where they were asked for.

        Raises:
            UnsupportedModelError: the logits hold NaN, or no token is allowed.
        """
        row = np.asarray(logits, np.float32)
        allowed = row if self.constraint is None else self.constraint.allow(row)
        token = self.sampler.pick(allowed, self.context)
        return token, None if self.logprobs is None else log_probabilities(row, token, self.logprobs)

    def accept(self, token: int, logprobs: TokenLogprobs | None, max_length: int) -> Finished | None:
        """Take `token` into the answer and report it; what ends the request, if it does.

        A text that ends by itself with the last token that it may have is a `stop`; one that is cut off is a `length`.

        Args:
            token: what `choose` gave.
            logprobs: the same.
            max_length: most tokens that a slot holds; the last token of a text needs no place in it.
        """
        self.context.append(token)
        self.produced += 1
        if token in self.eos_ids:
            self.send(Produced(token, "", logprobs, self.produced == 1))
            return Finished("stop", self.text.flush())
        if self.constraint is not None:
            self.constraint.accept(token)
        self.send(Produced(token, self.text.push(token), logprobs, self.produced == 1))
        if self.text.stopped:
            return Finished("stop")
        if self.constraint is not None and self.constraint.complete:
            return Finished("stop", self.text.flush())
        if self.produced >= self.max_new_tokens or len(self.context) > max_length:
            rest = self.text.flush()
            return Finished("stop" if self.text.stopped else "length", rest)
        return None
