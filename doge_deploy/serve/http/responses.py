"""Bodies of answers, in OpenAI's shapes.

Reference: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from doge_deploy.runtime.logprobs import TokenLogprobs
from doge_deploy.serve.tokens import TokenTexts

Json = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, all its choices together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
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
    echoed: str = ""
    """The prompt, where the text begins with it."""
    offset: int = 0
    """Characters of the text before the one that the next token begins or is a part of."""
    decoder: IncrementalDecoder = field(default_factory=lambda: getincrementaldecoder("utf-8")("replace"))
    """Holds the bytes of a character that is not there whole."""
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
            self.offset += self._characters(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [
                None if entry is None else {self.texts[token].token: logprob for token, logprob in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }

    def _characters(self, token: int) -> int:
        """Of the text that are whole with `token`. A special token is left out of a text, but not out of an echoed
        prompt that was given as ids, or in which its text was written.
        """
        found = self.texts[token]
        if not self.texts.is_special(token):
            return len(self.decoder.decode(bytes(found.bytes)))
        return len(found.token) if self.echoed.startswith(found.token, self.offset) else 0


_LINE_ENDS = ("\x85", "\u2028", "\u2029")
"""JSON need not escape them, and no line of an event ends with one; but clients that read lines by Python's
`str.splitlines`, httpx among them, think so.
"""

_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def line_of_json(value: Any) -> str:
    """JSON that is one line to whoever reads lines."""
    text = _ENCODE(value)
    if not text.isascii():
        for end in _LINE_ENDS:
            text = text.replace(end, f"\\u{ord(end):04x}")
    return text


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + line_of_json(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


_SOME = 10_000
"""Numbers that are written while no other thread runs."""


def tokens_json(ids: Sequence[int], max_length: int) -> str:
    """The answer of `/tokenize`, of which there may be millions."""
    written = ",".join(",".join(map(str, ids[at : at + _SOME])) for at in range(0, len(ids), _SOME))
    return f'{{"tokens":[{written}],"count":{len(ids)},"max_model_len":{max_length}}}'
