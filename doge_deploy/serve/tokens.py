"""What single tokens stand for, for logprobs: a token may be a part of a character."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer


@dataclass(frozen=True)
class TokenText:
    """One token as a client sees it."""

    token: str
    """Its text; U+FFFD where it is no whole character."""
    bytes: list[int]
    """UTF-8; joined over the tokens of an answer they are its text."""


@dataclass(frozen=True)
class _Known:
    text: TokenText
    special: bool


class TokenTexts:
    """Texts of single tokens of one tokenizer, each looked up once."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, _Known] = {}

    def __getitem__(self, token: int) -> TokenText:
        return self._find(token).text

    def is_special(self, token: int) -> bool:
        """Whether it is left out of texts."""
        return self._find(token).special

    def _find(self, token: int) -> _Known:
        if token not in self._known:
            data = self._tokenizer.decode_bytes([token])
            text = TokenText(data.decode("utf-8", "replace"), list(data))
            self._known[token] = _Known(text, self._tokenizer.is_special_token(token))
        return self._known[token]
