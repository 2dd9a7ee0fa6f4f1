"""Chat and text completions: from a body to the requests that it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from doge_deploy.errors import BrokenBundleError
from doge_deploy.runtime.logprobs import TokenLogprobs
from doge_deploy.serve.grammar.compiler import Grammar
from doge_deploy.serve.http.errors import ApiError, about, field_of
from doge_deploy.serve.http.offload import Offload
from doge_deploy.serve.http.requests import ChatBody, CompletionBody, GenerationBody, Message, StreamOptions
from doge_deploy.serve.http.responses import Usage
from doge_deploy.serve.model import Answering, ServedText
from doge_deploy.serve.request import Request
from doge_deploy.serve.scheduler import QueueFullError
from doge_deploy.serve.tokens import TokenTexts
from doge_deploy.text.tokenizer import Tokenizer

SHORT_CHARACTERS = 2048
"""Of a prompt, or tokens of all prompts of a request, up to which the work is done at once: to wake another thread and
wait for it would take longer, and nobody waits for as long as one piece of a stream takes.
"""

COMPLETION_TOKENS = 16
"""Of a text completion where nobody says, as in OpenAI's API."""


@dataclass
class Choice:
    """One text of an answer."""

    index: int
    prompt_ids: Sequence[int]
    prompt_text: str | None = None
    """Where the prompt is echoed."""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    finish_reason: str | None = None
    cached_tokens: int = 0
    """Of the prompt, those that were not computed for this choice."""

    @property
    def text(self) -> str:
        """All of it so far, without the prompt."""
        return "".join(self.pieces)


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
    texts: TokenTexts | None = None
    """Where logprobs were asked for."""
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    continuous_usage: bool = False
    """Every chunk has the usage so far."""

    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once, however many choices it has, and so does what was computed of it: the
        others find in a slot what the first of them computed.
        """
        prompts: dict[int, int] = {}
        cached: dict[int, int] = {}
        for choice in self.choices:
            key = id(choice.prompt_ids)  # two prompts may be equal
            prompts[key] = len(choice.prompt_ids)
            cached[key] = min(cached.get(key, choice.cached_tokens), choice.cached_tokens)
        return Usage(sum(prompts.values()), self.completion_tokens, sum(cached.values()))


@dataclass(frozen=True)
class _Wanted:
    """What chat and text completions say in fields of their own."""

    prompts: Sequence[tuple[list[int], str | None]]
    """Ids of each, and its text where that is echoed."""
    length: int | None
    """Tokens of an answer."""
    default_length: int | None
    """The same where nobody says; all that fit where None."""
    logprobs: int | None
    echo: bool = False


async def plan_chat(body: ChatBody, model: ServedText, name: str, offload: Offload) -> Plan:
    """Check a chat request; render and encode its messages.

    Raises:
        ApiError, UsageError: it cannot be answered.
    """
    _check_number(body, 1, model)
    messages, size = conversation(body.messages)
    ids = await offload(lambda: rendered(model.tokenizer, messages, model), size)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return await _plan(body, model, name, _Wanted([(ids, None)], body.max_new_tokens, None, logprobs), offload)


def conversation(messages: Sequence[Message]) -> tuple[list[dict[str, str]], int]:
    """What a template gets of messages, and how many characters they have."""
    found = [{"role": message.role, "content": message.text} for message in messages]
    return found, sum(len(message["content"]) for message in found)


def rendered(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], model: ServedText | None = None) -> list[int]:
    """Ids of a conversation; what the template makes of these messages is the client's business.

    Args:
        tokenizer: of the model.
        messages: each with `role` and `content`.
        model: what is to answer them; None where they need not fit.

    Raises:
        ApiError: the template refuses them, breaks on them, or was stopped by a limit; they cannot be answered.
    """
    with about("messages"):
        try:
            ids = tokenizer.render_chat(messages, literal=True, room=None if model is None else model.max_length)
        except BrokenBundleError as error:  # of the template, which is as it is
            raise ApiError(400, f"messages: {error}", param="messages") from error
        if model is not None:
            model.check_prompt(ids)
        return ids


async def plan_completion(body: CompletionBody, model: ServedText, name: str, offload: Offload) -> Plan:
    """Check a text completion request and encode its prompts; raises as `plan_chat`."""

    def encoded() -> list[tuple[list[int], str | None]]:
        found = []
        for index, prompt in enumerate(body.prompts):
            with about(field_of("prompt", index, body.prompts)):
                ids = model.encode(prompt)
            text = None
            if body.echo:
                text = prompt if isinstance(prompt, str) else model.tokenizer.text_of(ids)
            found.append((ids, text))
        return found

    _check_number(body, len(body.prompts), model)
    length = sum(map(len, body.prompts))
    prompts = encoded() if length <= SHORT_CHARACTERS else await offload(encoded, length)
    if body.echo and body.logprobs is not None and not model.all_logits:
        raise ApiError(
            400,
            "echo with logprobs needs the logits of the prompt's tokens, which this model does not give here; "
            "export it with --logits all",
            param="echo",
        )
    wanted = _Wanted(prompts, body.max_new_tokens, COMPLETION_TOKENS, body.logprobs, bool(body.echo))
    plan = await _plan(body, model, name, wanted, offload)
    if body.max_tokens == 0:
        for request in plan.requests:
            request.max_new_tokens = 0
    return plan


def _check_number(body: GenerationBody, prompts: int, model: ServedText) -> None:
    """Raises ApiError where there are more texts than an idle server takes; before any of them is encoded."""
    number = prompts * (body.n or 1)
    limit = model.engine.limits.queue_requests + model.engine.scheduler.runner.slots
    if number > limit:
        param = "prompt" if (body.n or 1) == 1 else "n"
        said = f"{param}: {number} texts in one request; this server takes at most {limit}"
        raise ApiError(400, said, param=param)


def _check_tokens(body: GenerationBody, lengths: Sequence[int], model: ServedText) -> None:
    """Raises ApiError where the prompts have more tokens than may ever wait: later there is no more room."""
    repeated = [length for length in lengths for _ in range(body.n or 1)]
    try:
        model.engine.scheduler.check_alone(repeated)
    except QueueFullError as error:
        param = "prompt" if (body.n or 1) == 1 else "n"
        message = f"{param}: {sum(repeated)} prompt tokens in one request, too many even if it comes alone: {error}"
        raise ApiError(400, message, param=param) from error


async def _plan(body: GenerationBody, model: ServedText, name: str, wanted: _Wanted, offload: Offload) -> Plan:
    lengths = [len(ids) for ids, _ in wanted.prompts]
    _check_tokens(body, lengths, model)
    grammar = await _grammar(body, model)
    # what names tokens takes a moment to be made; and a request looks at each token of its prompt: there may be many of
    # both
    is_long = len(lengths) * (body.n or 1) * max(lengths) > SHORT_CHARACTERS
    if is_long or wanted.logprobs is not None:
        return await offload(lambda: _planned(body, model, name, wanted, grammar))
    return _planned(body, model, name, wanted, grammar)


def _planned(body: GenerationBody, model: ServedText, name: str, wanted: _Wanted, grammar: Grammar | None) -> Plan:
    asked = _asked(body, wanted.length)
    choices: list[Choice] = []
    requests: list[Request] = []
    answering: Answering | None = None
    for prompt_ids, text in wanted.prompts:
        with about("logit_bias"):  # all else was checked with the body
            options = model.options(asked, len(prompt_ids), wanted.default_length)
        if body.ignore_eos:
            options = replace(options, eos_ids=frozenset())
        answering = Answering(options, wanted.logprobs, wanted.echo and wanted.logprobs is not None, grammar)
        for number in range(body.n or 1):
            index = len(choices)
            choices.append(Choice(index, prompt_ids, text))
            requests.append(model.request(f"{name}-{index}", prompt_ids, answering, number))
    assert answering is not None
    asked_usage = body.stream_options or StreamOptions()
    usage = asked_usage.include_usage
    continuous = usage and asked_usage.continuous_usage_stats
    texts = None if wanted.logprobs is None else model.token_texts
    return Plan(model, answering, choices, requests, bool(body.stream), usage, name, texts, continuous_usage=continuous)


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


async def _grammar(body: GenerationBody, model: ServedText) -> Grammar | None:
    """What the answer must look like; raises ApiError that names the field."""
    if (guide := body.guide) is None:
        return None
    with about(guide.field):
        return await model.grammars.compile(guide.kind, guide.source)
