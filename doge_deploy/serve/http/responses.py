"""Bodies of answers, in OpenAI's shapes.

Reference: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from doge_deploy.runtime.logprobs import TokenLogprobs
from doge_deploy.serve.tokens import TokenTexts

Json = dict[str, Any]


@dataclass
class Usage:
    """Tokens of a request, all its choices together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts, those that were not computed again."""

    def json(self) -> Json:
        """`usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def chat_logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts) -> Json:
    """`logprobs` of a chat choice: one entry a token."""

    def entry(token: int, logprob: float) -> Json:
        return {**asdict(texts[token]), "logprob": logprob}

    return {
        "content": [
            {
                **entry(found.token, found.logprob),
                "top_logprobs": [entry(token, logprob) for token, logprob in found.top],
            }
            for found in entries
        ],
        "refusal": None,
    }


@dataclass
class CompletionLogprobs:
    """`logprobs` of a text completion, whose lists grow with the text."""

    texts: TokenTexts
    offset: int = 0
    """Characters of the text before the next token."""
    entries: list[TokenLogprobs | None] = field(default_factory=list)
    first: int | None = None
    """The token that has no logprob: the first of an echoed prompt."""

    def json(self, entries: Sequence[TokenLogprobs | None], first: int | None = None) -> Json:
        """Those of `entries`; `first` is the token of an entry that is None."""
        tokens, offsets = [], []
        for entry in entries:
            token = first if entry is None else entry.token
            assert token is not None
            tokens.append(self.texts[token].token)
            offsets.append(self.offset)
            self.offset += self.texts.characters(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [
                None if entry is None else {self.texts[token].token: logprob for token, logprob in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
