"""`logprobs` of answers, in OpenAI's shapes, written straight as JSON.

A whole answer may have some hundred thousand of these numbers: an object for each would take ten times as long, and an
encoder that is given all of them at once lets no other thread run until it is done.

Reference: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field

from doge_deploy.runtime.logprobs import TokenLogprobs
from doge_deploy.serve.http.responses import Encoded
from doge_deploy.serve.tokens import TokenTexts

LOWEST = -9999.0
"""What OpenAI's API gives for what is as good as impossible: JSON has no infinity."""


def chat_logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts) -> Encoded:
    """`logprobs` of a chat choice: one entry a token, each with as many of the likeliest as were asked for."""

    def entry(token: int, logprob: float) -> str:
        return f'{texts[token].chat_json},"logprob":{_number(logprob)}'

    content = []
    for found in entries:
        top = ",".join([f"{{{entry(token, logprob)}}}" for token, logprob in found.top])
        content.append(f'{{{entry(found.token, found.logprob)},"top_logprobs":[{top}]}}')
    return Encoded(f'{{"content":[{",".join(content)}],"refusal":null}}')


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

    def json(self, entries: Sequence[TokenLogprobs | None], first: int | None = None) -> Encoded:
        """Those of `entries`; `first` is the token of an entry that is None: the first of an echoed prompt, which has
        no logprob.
        """
        tokens, logprobs, tops, offsets = [], [], [], []
        for entry in entries:
            token = first if entry is None else entry.token
            assert token is not None
            tokens.append(self.texts[token].name_json)
            logprobs.append("null" if entry is None else _number(entry.logprob))
            tops.append("null" if entry is None else self._top(entry))
            offsets.append(str(self.offset))
            self.offset += self._characters(token)
        lists = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
        return Encoded("{" + ",".join([f'"{name}":[{",".join(found)}]' for name, found in lists.items()]) + "}")

    def _top(self, entry: TokenLogprobs) -> str:
        """The likeliest tokens and the chosen one. Of those that have the same name the likeliest is shown: clients
        look whether the chosen token was the likeliest.
        """
        found: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            found.setdefault(self.texts[token].name_json, logprob)
        return "{" + ",".join([f"{name}:{_number(logprob)}" for name, logprob in found.items()]) + "}"

    def _characters(self, token: int) -> int:
        """Of the text that are whole with `token`. A special token is left out of a text, but not out of an echoed
        prompt that was given as ids, or in which its text was written.
        """
        found = self.texts[token]
        if not found.special:
            return len(self.decoder.decode(found.bytes))
        return len(found.token) if self.echoed.startswith(found.token, self.offset) else 0


def _number(logprob: float) -> str:
    return repr(logprob if logprob > LOWEST else LOWEST)
