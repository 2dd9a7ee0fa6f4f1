"""Token ids as text that can be shown: what it is made of is anybody's, so nothing in it acts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

from doge_deploy.errors import DogeDeployError

_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}

MOST = 24
"""Characters of a token that are shown."""


def token_texts(bundle: Path) -> Callable[[int], str]:
    """A function that gives the text of a token, empty where the bundle has no tokenizer that can be read."""
    from doge_deploy.text.files import TOKENIZER_FILE
    from doge_deploy.text.tokenizer import Tokenizer

    if not (bundle / TOKENIZER_FILE).is_file():
        return lambda token: ""
    try:
        tokenizer = Tokenizer.from_directory(bundle)
    except DogeDeployError:
        return lambda token: ""
    return lambda token: visible(tokenizer.text_of([token]))


def visible(text: str) -> str:
    """`text` in one line, every character that is not seen, or turns others around, by its number."""
    shown = [_VISIBLE.get(one) or (one if _harmless(one) else f"⟨{ord(one):04X}⟩") for one in text[: MOST + 1]]
    return "".join(shown[:MOST]) + ("…" if len(shown) > MOST else "")


def _harmless(character: str) -> bool:
    return unicodedata.category(character)[0] not in "CM" and not (
        unicodedata.category(character)[0] == "Z" and character != " "
    )
