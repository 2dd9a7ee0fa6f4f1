"""No text has fewer tokens than the longest of them allows, and where one may have, nothing is said."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

import doge_deploy
from doge_deploy.text import longest
from doge_deploy.text.longest import longest_token

DOGE_TINY = Path(doge_deploy.__file__).parent / "demo" / "doge-tiny"

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def bpe(
    singles: Iterable[str],
    *,
    runs: str = "",
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    post_processor: Any = None,
    added: Iterable[AddedToken] = (),
    **options: Any,
) -> Tokenizer:
    """Of single characters, and of each of `runs` up to eight together."""
    vocabulary = dict.fromkeys(singles)
    merges = []
    for one in runs:
        for part in (one, one * 2, one * 4):
            vocabulary |= dict.fromkeys((part, part * 2))
            merges.append((part, part))
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(vocabulary)}, merges, **options))
    return with_steps(tokenizer, normalizer, pre_tokenizer, post_processor, added)


def with_steps(
    tokenizer: Tokenizer,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    post_processor: Any = None,
    added: Iterable[AddedToken] = (),
) -> Tokenizer:
    steps = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor}
    for name, step in steps.items():
        if step is not None:
            setattr(tokenizer, name, step)
    tokenizer.add_tokens(list(added))
    return tokenizer


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def of_bytes(singles: Iterable[str] = ALPHABET, **options: Any) -> Tokenizer:
    return bpe(singles, **{"runs": "aĠ", "pre_tokenizer": BYTES, **options})


def of_pieces(
    singles: Iterable[str] = BYTE_TOKENS, replaced: str | Regex = " ", by: str = "▁", **options: Any
) -> Tokenizer:
    """As those of sentencepiece are written in tokenizer.json."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(replaced, by)])
    settings = {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True, **options}
    return bpe([*singles, "<unk>"], runs="a▁", normalizer=normalizer, **settings)


def of_words(model: Any) -> Tokenizer:
    return with_steps(Tokenizer(model), pre_tokenizer=pre_tokenizers.Whitespace())


def template(single: str) -> Any:
    return processors.TemplateProcessing(single, None, [("a", 0)])


SPLIT = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}|\s+"), "isolated")
LONG_ADDED = AddedToken("<a long token of its own>", normalized=False, special=True)
NO_TEXTS_BYTES = {*range(0xC0, 0xC2), *range(0xF5, 0x100)}

BOUND = {
    "doge-tiny": (Tokenizer.from_file(str(DOGE_TINY / "tokenizer.json")), 25),
    "bytes": (of_bytes(), 8),
    "bytes of no text are missing": (of_bytes([one for one in ALPHABET if ord(one) not in NO_TEXTS_BYTES]), 8),
    "bytes, by a normalizer": (bpe(ALPHABET, runs="aĠ", normalizer=normalizers.ByteLevel()), 8),
    "bytes behind a split": (of_bytes(pre_tokenizer=pre_tokenizers.Sequence([SPLIT, BYTES])), 8),
    "bytes, composed": (of_bytes(normalizer=normalizers.NFC()), 8 * 4),
    "an added token is the longest": (of_bytes(added=[LONG_ADDED]), len(LONG_ADDED.content)),
    "bos is put in front": (of_bytes(post_processor=template("a $A")), 8),
    "pieces": (of_pieces(), 8),
    "an added token that the normalizer makes longer": (of_pieces(added=[AddedToken("eight...")]), 9),
    "unknown characters one by one": (bpe(["<unk>"], runs="a", unk_token="<unk>"), 8),
}


COMBINING = "\u0301"
UNBOUND = {
    "a word that is not known is one token": (of_words(WordLevel({"<unk>": 0}, unk_token="<unk>")), "b" * 500),
    "a text without words has no token": (of_words(WordLevel({"<unk>": 0}, unk_token="<unk>")), " " * 500),
    "a long word is one token": (of_words(WordPiece({"[UNK]": 0, "b": 1}, unk_token="[UNK]")), "b" * 500),
    "what is not known is one piece": (Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False)), "b" * 500),
    "unknown characters are one token": (bpe(["<unk>"], runs="a", unk_token="<unk>", fuse_unk=True), "b" * 500),
    "unknown characters are left out": (bpe([], runs="a"), "b" * 500),
    "a byte is missing": (of_bytes(sorted(set(ALPHABET) - {"b"})), "b" * 500),
    "bytes are changed before they are looked up": (
        bpe(ALPHABET, normalizer=normalizers.Sequence([normalizers.ByteLevel(), normalizers.Replace("b", "中")])),
        "b" * 500,
    ),
    "a byte token is missing": (of_pieces([one for one in BYTE_TOKENS if one != "<0x62>"]), "b" * 500),
    "blanks are removed": (
        of_bytes(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTES])),
        " " * 500,
    ),
    "blanks are stripped": (of_bytes(normalizer=normalizers.Strip()), " " * 500),
    "accents are stripped": (of_bytes(normalizer=normalizers.StripAccents()), COMBINING * 500),
    "a run becomes one": (of_pieces(replaced=Regex(" +"), by="▁"), " " * 500),
    "letters become fewer": (of_pieces(replaced="b" * 16, by="a"), "b" * 512),
    "a token takes the blanks before it": (of_bytes(added=[AddedToken("<m>", lstrip=True)]), " " * 500 + "<m>"),
    "a token takes the blanks behind it": (of_bytes(added=[AddedToken("<m>", rstrip=True)]), "<m>" + " " * 500),
    "the text is not in what comes out": (of_bytes(post_processor=template("a")), "b" * 500),
}

TEXTS = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.builds(
            str.__mul__,
            st.sampled_from(
                ["a", " ", "▁", "Ġ", LONG_ADDED.content, "eight...", "<unk>", "<0x61>", "ﷺ"]
                + [unicodedata.normalize("NFD", one) for one in "éṩᾂ각"]
            ),
            st.integers(1, 50),
        ),
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("name", BOUND)
@settings(deadline=None)
@given(TEXTS)
def test_no_text_has_fewer_tokens(name: str, text: str) -> None:
    tokenizer, bound = BOUND[name]
    assert longest_token(tokenizer) == bound
    for special in (False, True):
        assert len(tokenizer.encode(text, add_special_tokens=special).ids) * bound >= len(text)


@pytest.mark.parametrize("name", UNBOUND)
def test_nothing_is_said_where_a_token_may_stand_for_anything(name: str) -> None:
    tokenizer, text = UNBOUND[name]
    longest = max(map(len, tokenizer.get_vocab()))
    assert len(tokenizer.encode(text).ids) * longest < len(text), "no example: a bound could be given"
    assert longest_token(tokenizer) is None


def test_a_part_of_an_unknown_kind_may_do_anything() -> None:
    assert longest_token(of_bytes(normalizer=normalizers.Nmt())) is None
    assert longest_token(Tokenizer(BPE())) is None


def test_unicode_makes_one_character_of_no_more_than_is_said() -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    assert max(len(unicodedata.normalize("NFD", one)) for one in characters) == longest._COMPOSED
    assert min(len(unicodedata.normalize("NFKD", one)) for one in characters) == 1
    assert min(len(one.lower()) for one in characters) == 1
