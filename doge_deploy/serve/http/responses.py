"""Bodies of answers, in OpenAI's shapes.

Reference: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


class Encoded(str):
    """JSON that was written already."""


HOLE = Encoded("\0")
"""Stands where something is put later: JSON holds no such character, since it escapes those within texts."""


def written(value: Any) -> str:
    """JSON of objects, lists and what they hold, with every `Encoded` as it is; one line as `line_of_json`."""
    if isinstance(value, Encoded):
        return value
    if isinstance(value, Mapping):
        return "{" + ",".join([f"{line_of_json(name)}:{written(part)}" for name, part in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return line_of_json(value)


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + written(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


_SOME = 10_000
"""Numbers that are written while no other thread runs."""


def tokens_json(ids: Sequence[int], max_length: int) -> str:
    """The answer of `/tokenize`, of which there may be millions."""
    numbers = ",".join(",".join(map(str, ids[at : at + _SOME])) for at in range(0, len(ids), _SOME))
    return f'{{"tokens":[{numbers}],"count":{len(ids)},"max_model_len":{max_length}}}'
