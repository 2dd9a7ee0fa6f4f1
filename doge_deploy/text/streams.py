"""Ids to text as they come.

The reference implementation is the decoding of all ids at once, `tokenizers.Tokenizer.decode`. A stream gives out a
beginning of that text that no later id can change, and in the end all of it:

- bytes of a byte-level tokenizer that end within a character show as one U+FFFD at the end: it is held back;
- a run of byte tokens (`<0xE6>`) is decoded as a whole, and is U+FFFD for each byte where any of them is wrong: all of
  the run is held back until another token ends it;
- where a tokenizer's decoder works across tokens in some other way, everything is held back to the end.

Only the ids since the last complete character are decoded again, after as many earlier ones as the first letters of a
text need (some decoders take a blank away there).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

REPLACEMENT = "\ufffd"

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_LONGEST_WINDOW = 64
"""Ids that are decoded again with each new one, where a text goes wrong for long."""
_KEPT = 8
"""Ids that stay of a window that became too long: more than the bytes of a character."""


class Vocabulary:
    """What streams of one tokenizer need to know: its special tokens, and how its decoder works."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self._special = {
            index: token.content for index, token in backend.get_added_tokens_decoder().items() if token.special
        }
        # A special token is left out by its text: another id of that text is left out too.
        self._special_texts = frozenset(self._special.values())
        # What pickle stores of a decoder is its part of tokenizer.json; to write out all of that takes longer.
        decoder = backend.decoder
        steps = list(_steps(None if decoder is None else json.loads(decoder.__getstate__())))
        self.joins_bytes = any(step["type"] == "ByteFallback" for step in steps)
        self.works_across_tokens = not all(map(_is_local, steps)) or _changes_after_fusing(steps)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None where there is none or it is not part of the text."""
        token: str | None = self.backend.id_to_token(token_id)
        return None if token is None or token in self._special_texts else token

    def special_text(self, token_id: int) -> str:
        """The text of a special token, empty for any other token."""
        token = self.backend.id_to_token(token_id)
        return token if token is not None and token in self._special_texts else ""

    def decode(self, ids: list[int]) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoders of tokenizer.json, one after another; none where tokens are joined by blanks."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _is_local(step: dict[str, Any]) -> bool:
    """Whether the text of a token depends on nothing but the token and whether it is the first."""
    return step["type"] in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")


def _changes_after_fusing(steps: list[dict[str, Any]]) -> bool:
    """Whether a step after the one that joins all tokens may change more than the beginning of the text."""
    fused = False
    for step in steps:
        if step["type"] == "Strip" and fused:
            if step["stop"] > 0:
                return True
        elif step["type"] == "Replace" and fused:
            pattern = step["pattern"].get("String")
            if pattern is None or len(pattern) != 1:
                return True
        elif fused and step["type"] != "Fuse":
            return True
        fused = fused or step["type"] in ("Fuse", "ByteLevel")
    return False


class Detokenizer:
    """The text of one stream of ids, special tokens left out."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []
        """Ids that are decoded with the next one: all whose text is not given out, and some before them."""
        self._given = 0
        """Characters of the window's text that were given out."""

    def push(self, token_id: int) -> str:
        """The text that is certain after `token_id`; empty where it ends within a character."""
        token = self._vocabulary.token(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        if self._vocabulary.works_across_tokens or (self._vocabulary.joins_bytes and _BYTE_TOKEN.fullmatch(token)):
            return ""
        text = self._vocabulary.decode(self._window)
        certain = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if certain == len(text):
            self._shorten(1, held=0)
        elif len(self._window) > _LONGEST_WINDOW:
            self._shorten(_KEPT, held=len(text) - self._given)
        return piece

    def special_text(self, token_id: int) -> str:
        """What `push` leaves out: the text of a special token, empty for any other."""
        return self._vocabulary.special_text(token_id)

    def pending(self) -> str:
        """What `flush` would give now; empty where that is no complete character."""
        text = self._vocabulary.decode(self._window)[self._given :]
        return "" if REPLACEMENT in text else text

    def flush(self) -> str:
        """The rest, an unfinished character as U+FFFD. To be called once, after the last id."""
        piece = self._vocabulary.decode(self._window)[self._given :]
        self._window, self._given = [], 0
        return piece

    def _shorten(self, kept: int, held: int) -> None:
        """Forget the ids that neither the beginning nor the last `held` characters of the window's text depend on."""
        for start in range(len(self._window) - kept, 0, -1):
            text = self._vocabulary.decode(self._window[start:])
            if len(text) > held:  # the beginning of a text is behind what stays
                self._window, self._given = self._window[start:], len(text) - held
                return
