"""Shapes of answers, for `/openapi.json`: answers are built in `responses.py`, and tests compare them with these.

Reference: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Logprob = Annotated[float, Field(le=0)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field of the body that is at fault."""
    code: str | None


class ErrorAnswer(_Answer):
    """Every answer that is not what was asked for."""

    error: ErrorDetail


class PromptDetails(_Answer):
    """Of the prompts' tokens."""

    cached_tokens: Count


class UsageAnswer(_Answer):
    """Tokens of a request."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails


FinishReason = Literal["stop", "length"]


class TopLogprob(_Answer):
    """One of the likeliest tokens."""

    token: str
    bytes: list[Annotated[int, Field(ge=0, le=255)]]
    logprob: Logprob


class TokenLogprob(TopLogprob):
    """One token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobsAnswer(_Answer):
    """One entry a token."""

    content: list[TokenLogprob]
    refusal: None


class ChatMessage(_Answer):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One of `n` answers."""

    index: Count
    message: ChatMessage
    logprobs: ChatLogprobsAnswer | None
    finish_reason: FinishReason


class ChatCompletion(_Answer):
    """`POST /v1/chat/completions` without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: UsageAnswer


class CompletionLogprobsAnswer(_Answer):
    """Lists with one entry a token; the first token of an echoed prompt has no logprob."""

    tokens: list[str]
    token_logprobs: list[Logprob | None]
    top_logprobs: list[dict[str, Logprob] | None]
    text_offset: list[Count]


class CompletionChoice(_Answer):
    """One of the texts."""

    index: Count
    text: str
    logprobs: CompletionLogprobsAnswer | None
    finish_reason: FinishReason


class Completion(_Answer):
    """`POST /v1/completions` without `stream`."""

    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    choices: Annotated[list[CompletionChoice], Field(min_length=1)]
    usage: UsageAnswer


class EmbeddingRow(_Answer):
    """One text's vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str


class EmbeddingUsage(_Answer):
    """Tokens of all texts."""

    prompt_tokens: Count
    total_tokens: Count


class Embeddings(_Answer):
    """`POST /v1/embeddings`."""

    object: Literal["list"]
    data: Annotated[list[EmbeddingRow], Field(min_length=1)]
    model: str
    usage: EmbeddingUsage


class ModelCard(_Answer):
    """One model."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    max_model_len: Annotated[int, Field(ge=1)]
    doge_deploy: dict[str, Any]
    """What the bundle says about itself."""


class ModelList(_Answer):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(_Answer):
    """`POST /tokenize`."""

    tokens: list[Count]
    count: Count
    max_model_len: Annotated[int, Field(ge=1)]


class Detokenized(_Answer):
    """`POST /detokenize`."""

    prompt: str


class Health(_Answer):
    """`GET /health`."""

    status: Literal["ok"]


class Readiness(_Answer):
    """`GET /ready`."""

    status: Literal["ready", "draining", "failed"]


EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "With `stream`: one event for each piece of text, its data a chunk as JSON; the last one's "
            "data is [DONE].",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
}
"""The schema is that of one event."""
