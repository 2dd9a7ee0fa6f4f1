"""Calls of the `tokenizers` library during which other threads run.

The library lets go of Python's lock only where it is given several texts: while `encode` works on a long one, every
other thread of the process stands still. One text alone is still worked on in the thread that asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers


def ids_of(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Ids of a text, with what the post-processor adds or without; raises what the library raises."""
    (found,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = found.ids
    return ids


def text_of(backend: tokenizers.Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, special tokens included."""
    (text,) = backend.decode_batch([list(ids)], skip_special_tokens=False)
    return str(text)
