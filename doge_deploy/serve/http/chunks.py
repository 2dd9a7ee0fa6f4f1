"""The chunks of a stream: one event of the engine as the bytes that a client gets."""

from __future__ import annotations

from collections.abc import Sequence

from doge_deploy.runtime.logprobs import TokenLogprobs
from doge_deploy.serve.http.errors import as_api_error, error_body
from doge_deploy.serve.http.forms import NONE, Form
from doge_deploy.serve.http.plans import Choice, Plan
from doge_deploy.serve.http.responses import DONE, HOLE, Json, event, line_of_json
from doge_deploy.serve.request import Event, Finished, Produced, PromptScored, Started


class Chunks:
    """The stream of one answer.

    Most chunks differ in their text and their logprobs alone. So everything around these is made once for each choice,
    and only they are written for each token; `slow` is the same chunk made from its parts.
    """

    def __init__(self, plan: Plan, form: Form) -> None:
        self._plan, self._form = plan, form
        self._around: dict[int, list[bytes]] = {}

    def of(self, index: int, found: Event) -> Sequence[bytes]:
        """What `found` of the choice `index` adds to the stream.

        Raises:
            ApiError: the request failed.
        """
        plan, choice = self._plan, self._plan.choices[index]
        text = take(plan, choice, found)
        if isinstance(found, Produced):
            if found.logprobs is not None:
                return (self.part(choice, text, (found.logprobs,)),)
            return (self.part(choice, text),) if text else ()
        if isinstance(found, Finished):
            last = self._chunk(self._form.last(choice, plan))
            return (self.part(choice, text), last) if text else (last,)
        if isinstance(found, PromptScored) or not plan.answering.score_prompt:
            opening = self._form.first(choice, plan)
            return () if opening is None else (self._chunk(opening),)
        return ()

    def part(self, choice: Choice, text: str, entries: Sequence[TokenLogprobs] = ()) -> bytes:
        """A chunk with more text and the logprobs of its tokens, and nothing else."""
        if self._plan.continuous_usage:  # no two chunks are alike around their text
            return self.slow(choice, text, entries)
        around = self._around.get(choice.index)
        if around is None:
            around = self._chunk(self._form.part(choice, HOLE, HOLE)).split(HOLE.encode())
            self._around[choice.index] = around
        before, between, after = around
        logprobs = NONE if self._plan.texts is None else self._form.logprobs(choice, entries, self._plan)
        return b"%b%b%b%b%b" % (before, line_of_json(text).encode(), between, logprobs.encode(), after)

    def slow(self, choice: Choice, text: str, entries: Sequence[TokenLogprobs] = ()) -> bytes:
        """The same, made as every other chunk is."""
        logprobs = self._form.logprobs(choice, entries, self._plan)
        return self._chunk(self._form.part(choice, text, logprobs))

    def end(self) -> Sequence[bytes]:
        """What comes behind the last choice."""
        if not self._plan.include_usage:
            return (DONE,)
        return (self._event({"choices": [], "usage": self._plan.usage().json()}), DONE)

    def failed(self, error: Exception) -> Sequence[bytes]:
        """The end of a stream that cannot go on."""
        found = as_api_error(error)
        return (event(error_body(found.status, found.message, param=found.param, code=found.code)), DONE)

    def _chunk(self, choice: Json) -> bytes:
        if not self._plan.include_usage:
            return self._event({"choices": [choice]})
        usage = self._plan.usage().json() if self._plan.continuous_usage else None
        return self._event({"choices": [choice], "usage": usage})

    def _event(self, rest: Json) -> bytes:
        return event({**head(self._plan, self._form.chunk_object), **rest})


def head(plan: Plan, kind: str) -> Json:
    """What every body and chunk of an answer begins with."""
    return {"id": plan.name, "object": kind, "created": plan.created, "model": plan.model.name}


def take(plan: Plan, choice: Choice, found: Event) -> str:
    """Put an event into its choice; the text that it brings.

    Raises:
        ApiError: the request failed.
    """
    if isinstance(found, Produced):
        plan.completion_tokens += 1
        if not plan.stream:
            choice.pieces.append(found.text)
            if found.logprobs is not None:
                choice.logprobs.append(found.logprobs)
        return found.text
    if isinstance(found, Finished):
        if found.error is not None:
            raise as_api_error(found.error) from found.error
        choice.finish_reason = found.reason
        choice.pieces.append(found.text)
        return found.text
    if isinstance(found, Started):
        choice.cached_tokens = found.cached_tokens
    elif isinstance(found, PromptScored):
        choice.prompt_logprobs = found.entries
    return ""
