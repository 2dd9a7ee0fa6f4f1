"""Shapes of answers: a choice whole, and in the chunks of a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from doge_deploy.runtime.logprobs import TokenLogprobs
from doge_deploy.serve.http.logprobs import CompletionLogprobs, chat_logprobs
from doge_deploy.serve.http.plans import Choice, Plan
from doge_deploy.serve.http.responses import Encoded, Json

NONE = Encoded("null")


class Form(ABC):
    """The shape of an answer: chat or text."""

    object: str
    chunk_object: str

    @abstractmethod
    def choice(self, choice: Choice, plan: Plan) -> Json:
        """A whole choice."""

    @abstractmethod
    def first(self, choice: Choice, plan: Plan) -> Json | None:
        """A choice's first chunk, before any token; None where there is none."""

    @abstractmethod
    def part(self, choice: Choice, text: str, logprobs: Encoded) -> Json:
        """A chunk with more of the text, and with what `logprobs` gave."""

    @abstractmethod
    def logprobs(self, choice: Choice, entries: Sequence[TokenLogprobs], plan: Plan) -> Encoded:
        """Those of the next tokens; `null` where nobody asked for them."""

    @abstractmethod
    def last(self, choice: Choice, plan: Plan) -> Json:
        """The chunk that says why the text ended."""


class ChatForm(Form):
    """`chat.completion`"""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice, plan: Plan) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self.logprobs(choice, choice.logprobs, plan),
            "finish_reason": choice.finish_reason,
        }

    def first(self, choice: Choice, plan: Plan) -> Json | None:
        return self._chunk(choice, {"role": "assistant", "content": ""}, NONE)

    def part(self, choice: Choice, text: str, logprobs: Encoded) -> Json:
        return self._chunk(choice, {"content": text}, logprobs)

    def last(self, choice: Choice, plan: Plan) -> Json:
        return {**self._chunk(choice, {}, NONE), "finish_reason": choice.finish_reason}

    def logprobs(self, choice: Choice, entries: Sequence[TokenLogprobs], plan: Plan) -> Encoded:
        return NONE if plan.texts is None else chat_logprobs(entries, plan.texts)

    def _chunk(self, choice: Choice, delta: Json, logprobs: Encoded) -> Json:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class TextForm(Form):
    """`text_completion`"""

    object = chunk_object = "text_completion"

    def __init__(self) -> None:
        self._written: dict[int, CompletionLogprobs] = {}

    def choice(self, choice: Choice, plan: Plan) -> Json:
        entries = [*choice.prompt_logprobs, *choice.logprobs]
        return {
            "index": choice.index,
            "text": (choice.prompt_text or "") + choice.text,
            "logprobs": self.logprobs(choice, entries, plan),
            "finish_reason": choice.finish_reason,
        }

    def first(self, choice: Choice, plan: Plan) -> Json | None:
        if choice.prompt_text is None:
            return None
        return self._chunk(choice, choice.prompt_text, self.logprobs(choice, choice.prompt_logprobs, plan))

    def part(self, choice: Choice, text: str, logprobs: Encoded) -> Json:
        return self._chunk(choice, text, logprobs)

    def last(self, choice: Choice, plan: Plan) -> Json:
        return {**self._chunk(choice, "", NONE), "finish_reason": choice.finish_reason}

    def logprobs(self, choice: Choice, entries: Sequence[TokenLogprobs | None], plan: Plan) -> Encoded:
        if plan.texts is None:
            return NONE
        written = self._written.get(choice.index)
        if written is None:
            written = CompletionLogprobs(plan.texts, choice.prompt_text or "")
            self._written[choice.index] = written
        return written.json(entries, first=choice.prompt_ids[0])

    def _chunk(self, choice: Choice, text: str, logprobs: Encoded) -> Json:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}
