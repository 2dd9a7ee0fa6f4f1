"""What single tokens stand for, for logprobs: a token may be a part of a character."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer


@dataclass(frozen=True)
class TokenText:
    """One token as a client sees it."""

    bytes: bytes
    """UTF-8; joined over the tokens of an answer they are its text."""
    special: bool
    """It is left out of texts."""

    @cached_property
    def token(self) -> str:
        """Its text; U+FFFD where it is no whole character."""
        return self.bytes.decode("utf-8", "replace")

    @cached_property
    def name(self) -> str:
        r"""Its text; `bytes:\xNN...`, as OpenAI's API writes it, where it is not whole characters: all of those would
        have the same text.
        """
        try:
            return self.bytes.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes)

    @cached_property
    def name_json(self) -> str:
        """`name` as JSON of ASCII."""
        return json.dumps(self.name)

    @cached_property
    def chat_json(self) -> str:
        """The members `token` and `bytes` of a chat's entry, as JSON of ASCII."""
        return f'"token":{json.dumps(self.token)},"bytes":[{",".join(map(str, self.bytes))}]'


class TokenTexts(dict[int, TokenText]):
    """Texts of the tokens of one tokenizer by their ids, each looked up when it is first asked for."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> TokenText:
        found = TokenText(self._tokenizer.decode_bytes([token]), self._tokenizer.is_special_token(token))
        self[token] = found
        return found
