"""How many characters of a text one token may stand for, so that a text that cannot fit is not encoded first.

Encoding takes more than a hundred times the memory of its text. Whether a text is too long for any tokens that it may
become is known before, where a tokenizer leaves nothing of a text out and knows no token for whatever is unknown. What
is said of the library's parts here holds for every text; a part that is not named here may do anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_COMPOSED = 4
"""Characters that Unicode's composition makes one of, at most."""

_NORMALIZERS = {"ByteLevel": 1, "Lowercase": 1, "NFC": _COMPOSED, "NFD": 1, "NFKC": _COMPOSED, "NFKD": 1, "Prepend": 1}
"""Those that leave nothing out, and how many characters they make one of at most."""

_PRE_TOKENIZERS = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts")
"""Those that leave nothing out, but where they are told to remove what they split at."""

_POST_PROCESSORS = ("BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing")

_BYTES = [*range(0x80), *range(0x80, 0xC0), *range(0xC2, 0xF5)]
"""Those that UTF-8 has."""


def longest_token(backend: tokenizers.Tokenizer) -> int | None:
    """Characters of a text that one token stands for at most; None where nothing can be said."""
    normalizers, pre_tokenizers = list(_parts(backend.normalizer)), list(_parts(backend.pre_tokenizer))
    composed = 1
    for part in normalizers:
        if (number := _composes(part)) is None:
            return None
        composed *= number
    if not all(map(_splits_only, pre_tokenizers)) or not all(map(_adds_only, _parts(backend.post_processor))):
        return None
    # behind this step a text has the characters of bytes alone
    bytes_alone = [part["type"] for part in [*normalizers[-1:], *pre_tokenizers]].count("ByteLevel") > 0
    if not _knows_everything(backend.model, bytes_alone):
        return None
    texts = set(backend.get_vocab(with_added_tokens=False))
    for token in backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip:  # it takes the blanks beside it, however many
            return None
        texts.add(token.content)
        if backend.normalizer is not None:  # it may be looked for behind the normalizer
            texts.add(backend.normalizer.normalize_str(token.content))
    return composed * max(map(len, texts), default=0) or None


def _parts(step: Any) -> Iterator[dict[str, Any]]:
    """A step of the tokenizer as tokenizer.json has it, those of a sequence one after the other."""
    # What pickle stores of a step is its part of tokenizer.json; to write out all of that takes longer.
    return _flat(None if step is None else json.loads(step.__getstate__()))


def _flat(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    (parts,) = (value for key, value in step.items() if key != "type")
    for part in parts:
        yield from _flat(part)


def _composes(part: dict[str, Any]) -> int | None:
    """How many characters a normalizer makes one of at most; None where it may leave some out."""
    if part["type"] == "Replace":
        pattern = part["pattern"].get("String")
        return 1 if pattern is not None and len(part["content"]) >= len(pattern) else None
    return _NORMALIZERS.get(part["type"])


def _splits_only(part: dict[str, Any]) -> bool:
    return part["type"] in _PRE_TOKENIZERS and part.get("behavior") != "Removed"


def _adds_only(part: dict[str, Any]) -> bool:
    """Whether a post-processor leaves all tokens of a text in it."""
    return part["type"] in _POST_PROCESSORS and any(
        piece.get("Sequence", {}).get("id") == "A" for piece in part.get("single", [{"Sequence": {"id": "A"}}])
    )


def _knows_everything(model: Any, bytes_alone: bool) -> bool:
    """Whether each character becomes a token or a part of one, and of unknown ones each a token of its own.

    Args:
        model: of the tokenizer.
        bytes_alone: it gets the characters that stand for bytes, and no others.
    """
    from tokenizers import models

    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False  # other models make one token of a word, or of a run of words, that they do not know
    if bytes_alone and all(model.token_to_id(character) is not None for character in _characters_of_bytes()):
        return True
    if model.byte_fallback and all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in _BYTES):
        return True
    return model.unk_token is not None and not model.fuse_unk


def _characters_of_bytes() -> Iterator[str]:
    """What stands for the bytes of UTF-8 in a tokenizer of bytes: themselves where they can be seen, else from U+0100
    on, as GPT-2 has it.
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in seen]
    return (chr(byte if byte in seen else 0x100 + others.index(byte)) for byte in _BYTES)
