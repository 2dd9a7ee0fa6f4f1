"""Chat and text completions: from a body to requests, and from events to answers, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from doge_deploy.errors import DogeDeployError
from doge_deploy.runtime.logprobs import TokenLogprobs
from doge_deploy.serve.grammar import Grammar
from doge_deploy.serve.http.errors import ApiError, as_api_error, error_body
from doge_deploy.serve.http.inbox import Inbox
from doge_deploy.serve.http.requests import ChatBody, CompletionBody, GenerationBody
from doge_deploy.serve.http.responses import DONE, CompletionLogprobs, Json, Usage, chat_logprobs, event
from doge_deploy.serve.model import Answering, ServedText
from doge_deploy.serve.request import Event, Finished, Produced, PromptScored, Request, Started
from doge_deploy.text.tokenizer import Tokenizer

_Result = TypeVar("_Result")

Offload = Callable[[Callable[[], _Result]], Awaitable[_Result]]
"""Runs what takes long in a pool of threads: a long prompt must not hold up the streams of others."""

COMPLETION_TOKENS = 16
"""Of a text completion where nobody says, as in OpenAI's API."""

CLOSED_REQUEST = 499
"""What the log says of a client that went away; nobody reads it."""


@dataclass
class Choice:
    """One text of an answer."""

    index: int
    prompt_ids: Sequence[int]
    prompt_text: str | None = None
    """Where the prompt is echoed."""
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    finish_reason: str | None = None


@dataclass
class Plan:
    """What was asked for, checked, and the requests that it takes."""

    model: ServedText
    answering: Answering
    choices: list[Choice]
    requests: list[Request]
    stream: bool
    include_usage: bool
    name: str
    created: int = field(default_factory=lambda: int(time.time()))
    usage: Usage = field(default_factory=Usage)


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
    def part(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs], plan: Plan) -> Json:
        """A chunk with more of the text."""

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
            "logprobs": self._logprobs(choice.logprobs, plan),
            "finish_reason": choice.finish_reason,
        }

    def first(self, choice: Choice, plan: Plan) -> Json | None:
        return self._chunk(choice, {"role": "assistant", "content": ""}, None)

    def part(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs], plan: Plan) -> Json:
        return self._chunk(choice, {"content": text}, self._logprobs(logprobs, plan))

    def last(self, choice: Choice, plan: Plan) -> Json:
        return {**self._chunk(choice, {}, None), "finish_reason": choice.finish_reason}

    def _logprobs(self, entries: Sequence[TokenLogprobs], plan: Plan) -> Json | None:
        return None if plan.answering.logprobs is None else chat_logprobs(entries, plan.model.token_texts)

    def _chunk(self, choice: Choice, delta: Json, logprobs: Json | None) -> Json:
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
            "logprobs": self._logprobs(choice, entries, plan),
            "finish_reason": choice.finish_reason,
        }

    def first(self, choice: Choice, plan: Plan) -> Json | None:
        if choice.prompt_text is None:
            return None
        return self._chunk(choice, choice.prompt_text, self._logprobs(choice, choice.prompt_logprobs, plan))

    def part(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs], plan: Plan) -> Json:
        return self._chunk(choice, text, self._logprobs(choice, logprobs, plan))

    def last(self, choice: Choice, plan: Plan) -> Json:
        return {**self._chunk(choice, "", None), "finish_reason": choice.finish_reason}

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprobs | None], plan: Plan) -> Json | None:
        if plan.answering.logprobs is None:
            return None
        written = self._written.setdefault(choice.index, CompletionLogprobs(plan.model.token_texts))
        return written.json(entries, first=choice.prompt_ids[0])

    def _chunk(self, choice: Choice, text: str, logprobs: Json | None) -> Json:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}


async def plan_chat(body: ChatBody, model: ServedText, name: str, offload: Offload[Any]) -> Plan:
    """Check a chat request; render and encode its messages.

    Raises:
        ApiError, UsageError: it cannot be answered.
    """
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    ids = await offload(lambda: rendered(model.tokenizer, messages))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return await _plan(body, model, name, [(ids, None)], body.max_new_tokens, None, logprobs, offload)


def rendered(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation; what the template makes of these messages is the client's business.

    Raises:
        ApiError: the template refuses them, breaks on them, or was stopped by a limit.
    """
    try:
        return tokenizer.render_chat(messages, literal=True)
    except DogeDeployError as error:
        raise ApiError(400, str(error), param="messages") from error


async def plan_completion(body: CompletionBody, model: ServedText, name: str, offload: Offload[Any]) -> Plan:
    """Check a text completion request and encode its prompts; raises as `plan_chat`."""

    def encoded() -> list[tuple[list[int], str | None]]:
        found = []
        for prompt in body.prompts:
            ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            text = None
            if body.echo:
                text = prompt if isinstance(prompt, str) else model.tokenizer.text_of(ids)
            found.append((ids, text))
        return found

    prompts = await offload(encoded)
    if body.echo and body.logprobs is not None and not model.all_logits:
        raise ApiError(
            400,
            "echo with logprobs needs the logits of the prompt's tokens, which this model does not give here; "
            "export it with --logits all",
            param="echo",
        )
    length = body.max_tokens
    plan = await _plan(body, model, name, prompts, length, COMPLETION_TOKENS, body.logprobs, offload, bool(body.echo))
    if length == 0:
        for request in plan.requests:
            request.max_new_tokens = 0
    return plan


async def _plan(
    body: GenerationBody,
    model: ServedText,
    name: str,
    prompts: Sequence[tuple[list[int], str | None]],
    length: int | None,
    default_length: int | None,
    logprobs: int | None,
    offload: Offload[Any],
    echo: bool = False,
) -> Plan:
    if (number := len(prompts) * (body.n or 1)) > (limit := model.engine.limits.queue_requests):
        raise ApiError(400, f"n: {number} texts in one request; this server takes at most {limit}", param="n")
    grammar = await offload(lambda: _grammar(body, model))
    # a request looks at each token of its prompt, and there may be many of both
    plan: Plan = await offload(
        lambda: _planned(body, model, name, prompts, length, default_length, logprobs, grammar, echo)
    )
    return plan


def _planned(
    body: GenerationBody,
    model: ServedText,
    name: str,
    prompts: Sequence[tuple[list[int], str | None]],
    length: int | None,
    default_length: int | None,
    logprobs: int | None,
    grammar: Grammar | None,
    echo: bool,
) -> Plan:
    asked = _asked(body, length)
    choices: list[Choice] = []
    requests: list[Request] = []
    answering: Answering | None = None
    for prompt_ids, text in prompts:
        model.check_prompt(prompt_ids)
        options = model.options(asked, len(prompt_ids), default_length)
        answering = Answering(options, logprobs, echo and logprobs is not None, grammar)
        for number in range(body.n or 1):
            index = len(choices)
            choices.append(Choice(index, prompt_ids, text))
            requests.append(model.request(f"{name}-{index}", prompt_ids, answering, number))
    assert answering is not None
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    plan = Plan(model, answering, choices, requests, bool(body.stream), include_usage, name)
    plan.usage.prompt_tokens = sum(len(ids) for ids, _ in prompts)
    return plan


def _asked(body: GenerationBody, length: int | None) -> dict[str, Any]:
    """The body's options under their names in generation_config.json."""
    asked: dict[str, Any] = {
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()} or None,
        "seed": None if body.seed is None else body.seed % 2**64,
        "stop_strings": body.stop,
        "max_new_tokens": length,
    }
    if body.temperature == 0:
        asked["do_sample"] = False
    elif body.temperature is not None:
        asked |= {"temperature": body.temperature, "do_sample": True}
    elif any(asked[name] is not None for name in ("top_p", "top_k", "min_p")):
        asked["do_sample"] = True
    return asked


def _grammar(body: GenerationBody, model: ServedText) -> Grammar | None:
    form = body.response_format
    if body.guided_regex is not None:
        return model.compiler.compile("regex", body.guided_regex)
    if body.guided_choice is not None:
        return model.compiler.compile("choice", body.guided_choice)
    if body.guided_grammar is not None:
        return model.compiler.compile("grammar", body.guided_grammar)
    if body.guided_json is not None:
        return model.compiler.compile("json_schema", body.guided_json)
    if form is not None and form.json_schema is not None:
        return model.compiler.compile("json_schema", form.json_schema.schema_)
    if form is not None and form.type == "json_object":
        return model.compiler.compile("json_object")
    return None


async def answer(plan: Plan, form: Form, inbox: Inbox, http: HttpRequest) -> Response:
    """Run the plan; a stream, or a whole answer. A client that goes away frees its slots."""
    if plan.stream:
        stack = contextlib.AsyncExitStack()
        # what refuses the request (a full queue) must become its status, so it is submitted before the answer begins
        streams = await stack.enter_async_context(inbox.submitted(plan.model.engine, plan.requests))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _Stream(_streamed(plan, form, streams), stack, headers)
    async with inbox.submitted(plan.model.engine, plan.requests) as streams:
        if not await unless_gone(_collected(plan, streams), http):
            return Response(status_code=CLOSED_REQUEST)
    return JSONResponse(
        {
            **_head(plan, form.object),
            "choices": [form.choice(choice, plan) for choice in plan.choices],
            "usage": plan.usage.json(),
        }
    )


class _Stream(StreamingResponse):
    """A stream that frees its slots when it ends, however it ends: also where the client left before its first byte."""

    def __init__(
        self, content: AsyncIterator[bytes], stack: contextlib.AsyncExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def unless_gone(work: Coroutine[Any, Any, _Result], http: HttpRequest) -> _Result | None:
    """What `work` gives; None, and the work is cancelled, where the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _head(plan: Plan, kind: str) -> Json:
    return {"id": plan.name, "object": kind, "created": plan.created, "model": plan.model.name}


async def _collected(plan: Plan, streams: Sequence[AsyncIterator[Event]]) -> bool:
    """Read every choice to its end; true.

    Raises:
        ApiError: one of them failed.
    """

    async def read(choice: Choice, events: AsyncIterator[Event]) -> None:
        async for found in events:
            _take(plan, choice, found)

    await asyncio.gather(*(read(choice, events) for choice, events in zip(plan.choices, streams, strict=True)))
    return True


def _take(plan: Plan, choice: Choice, found: Event) -> str:
    """Put an event into its choice; the text that it brings.

    Raises:
        ApiError: the request failed.
    """
    if isinstance(found, Started):
        plan.usage.cached_tokens += found.cached_tokens
    elif isinstance(found, PromptScored):
        choice.prompt_logprobs = found.entries
    elif isinstance(found, Produced):
        plan.usage.completion_tokens += 1
        if found.logprobs is not None:
            choice.logprobs.append(found.logprobs)
        choice.text += found.text
        return found.text
    elif isinstance(found, Finished):
        if found.error is not None:
            raise as_api_error(found.error) from found.error
        choice.finish_reason = found.reason
        choice.text += found.text
        return found.text
    return ""


async def _streamed(plan: Plan, form: Form, streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[bytes]:
    """Server-sent events of all choices as they come."""

    def chunk(choice: Json | None) -> bytes:
        body = {**_head(plan, form.chunk_object), "choices": [] if choice is None else [choice]}
        return event({**body, "usage": None} if plan.include_usage else body)

    try:
        async for index, found in _merged(streams):
            choice = plan.choices[index]
            text = _take(plan, choice, found)
            if (isinstance(found, Started) and not plan.answering.score_prompt) or isinstance(found, PromptScored):
                opening = form.first(choice, plan)
            else:
                opening = None
            if opening is not None:
                yield chunk(opening)
            if isinstance(found, Produced) and (text or found.logprobs is not None):
                yield chunk(form.part(choice, text, [found.logprobs] if found.logprobs else [], plan))
            elif isinstance(found, Finished):
                if text:
                    yield chunk(form.part(choice, text, [], plan))
                yield chunk(form.last(choice, plan))
        if plan.include_usage:
            yield event({**_head(plan, form.chunk_object), "choices": [], "usage": plan.usage.json()})
        yield DONE
    except Exception as error:  # the answer has begun: its status cannot be changed any more
        failed = as_api_error(error)
        yield event(error_body(failed.status, failed.message, param=failed.param, code=failed.code))
        yield DONE


async def _merged(streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[tuple[int, Event]]:
    """Events of several streams in the order in which they come, each with its stream's number."""
    if len(streams) == 1:
        async for found in streams[0]:
            yield 0, found
        return
    # short: what waits for a client that does not read is counted where it came from
    merged: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(1)

    async def read(index: int, stream: AsyncIterator[Event]) -> None:
        async for found in stream:
            await merged.put((index, found))

    tasks = [asyncio.ensure_future(read(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            index, found = await merged.get()
            running -= isinstance(found, Finished)
            yield index, found
    finally:
        for task in tasks:
            task.cancel()


def new_name(prefix: str) -> str:
    """A name for an answer, such as `chatcmpl-3f2a...`."""
    return f"{prefix}-{secrets.token_hex(12)}"
