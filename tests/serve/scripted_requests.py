"""Requests for scripted rows, what each should get, and a scheduler to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from scripted_slots import ScriptedSlots, next_token

from doge_deploy.runtime.sampling import Sampler, SamplingOptions
from doge_deploy.serve.request import Event, Finished, Produced, Request, Started
from doge_deploy.serve.scheduler import Limits, Scheduler

EOS = 1


class Digits:
    """Each token as its number; stops behind a given text."""

    def __init__(self, stop: str | None = None) -> None:
        self.stopped, self._stop, self._text = False, stop, ""

    def push(self, token: int) -> str:
        self._text += f"{token} "
        self.stopped = self._stop is not None and self._stop in self._text
        return "" if self.stopped else f"{token} "

    def flush(self) -> str:
        return ""


class Answer(list[Event]):
    """The events of one request."""

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self if isinstance(event, Produced)]

    @property
    def finished(self) -> Finished:
        assert isinstance(self[-1], Finished)
        return self[-1]

    @property
    def cached(self) -> int:
        return next(event.cached_tokens for event in self if isinstance(event, Started))


def request(prompt: Sequence[int], *, name: str = "r", tokens: int = 8, **changes: Any) -> tuple[Request, Answer]:
    answer = Answer()
    options = changes.pop("sampling", SamplingOptions())
    fields = {"eos_ids": frozenset({EOS}), "text": Digits(changes.pop("stop", None)), **changes}
    return Request(name, list(prompt), Sampler(options), tokens, answer.append, **fields), answer


def alone(prompt: Sequence[int], tokens: int, rule: Callable[[Sequence[int]], int] = next_token) -> list[int]:
    history = list(prompt)
    for _ in range(tokens):
        history.append(rule(history))
        if history[-1] == EOS:
            break
    return history[len(prompt) :]


def run(scheduler: Scheduler, limit: int = 10_000) -> None:
    for _ in range(limit):
        assert not scheduler.runner.wrong  # type: ignore[attr-defined]
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def make(slots: int = 2, *, limits: Limits | None = None, costs: Any = None, **rows: Any) -> Scheduler:
    exact_length = None if rows.get("cuts", True) else 0  # nothing could be taken back
    return Scheduler(ScriptedSlots(slots, **rows), limits, costs, exact_length)
