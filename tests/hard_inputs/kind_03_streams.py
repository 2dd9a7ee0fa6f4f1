"""Streams of ids: pieces joined are the text of all ids, and a text ends where transformers' stop strings end it."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from doge_deploy.runtime.generate import StopStrings
from doge_deploy.text.streams import Detokenizer, Vocabulary
from hard_inputs.frame import Case, Outcome, right, wrong
from hard_inputs.tokenizers_made import FAMILIES, saved

KIND = "3 streams"

STREAMS = 3000
"""Of each family; the suite tries some of them, and all in the full run."""

TEXT = " The fox, it's 漢字 😀👩‍👩‍👧 don't\n  déjà vu. ## <x> 1,234 한국어"


def backend(family: str) -> Backend:
    made: Backend = Backend.from_str(saved(family)["tokenizer.json"].decode())
    made.add_special_tokens(["<|stop|>"])
    return made


def streams(made: Backend, count: int, seed: str) -> Iterator[list[int]]:
    """Ids that were never one text: any ids, runs of bytes, cut and shuffled texts, special tokens between."""
    draw = random.Random(seed)
    vocab = made.get_vocab()
    everything = [*sorted(vocab.values()), max(vocab.values()) + 7]
    single = [index for token, index in sorted(vocab.items()) if token.startswith("<0x") or len(token) == 1]
    special = sorted(made.get_added_tokens_decoder())
    text = made.encode(TEXT, add_special_tokens=False).ids or everything[:5]
    for _ in range(count):
        ids: list[int] = []
        for _ in range(draw.randrange(1, 8)):
            start = draw.randrange(len(text))
            ids += draw.choice(
                (
                    [draw.choice(everything) for _ in range(draw.randrange(1, 6))],
                    [draw.choice(single or everything) for _ in range(draw.randrange(1, 9))],
                    text[start : start + draw.randrange(1, 9)],
                    [draw.choice(special)],
                )
            )
        yield ids


def joined(family: str, count: int, folder: Path) -> Outcome:
    made = backend(family)
    vocabulary = Vocabulary(made)
    for ids in streams(made, count, family):
        detokenizer = Detokenizer(vocabulary)
        pieces = [*(detokenizer.push(index) for index in ids), detokenizer.flush()]
        if "".join(pieces) != (whole := made.decode(ids, skip_special_tokens=True)):
            return wrong(f"{ids}: {pieces} instead of {whole!r}")
    return right()


def whole_characters(family: str, folder: Path) -> Outcome:
    """A text comes in whole characters, and is not held back to its end."""
    made = backend(family)
    ids = made.encode("The fox 漢字 jumps 😀 over the dog", add_special_tokens=False).ids
    detokenizer = Detokenizer(Vocabulary(made))
    pieces = [*(detokenizer.push(index) for index in ids), detokenizer.flush()]
    if any("\ufffd" in piece for piece in pieces):
        return wrong(f"a broken character: {pieces}")
    return right() if sum(map(bool, pieces)) >= 5 else wrong(f"held back: {pieces}")


def wrong_bytes(family: str, folder: Path) -> Outcome:
    """Bytes that never become a character: every one is U+FFFD in the end, and a stream of thousands stays fast."""
    made = backend(family)
    first = made.token_to_id("<0xE6>")
    first = made.token_to_id("æ") if first is None else first  # how a byte-level vocabulary writes 0xE6
    detokenizer = Detokenizer(Vocabulary(made))
    pieces = [*(detokenizer.push(first) for _ in range(3000)), detokenizer.flush()]
    return right() if "".join(pieces) == "\ufffd" * 3000 else wrong(f"{len(''.join(pieces))} characters")


STOPS: dict[str, tuple[str, list[str]]] = {
    "a special token": ("The fox<|stop|> jumps", ["<|stop|>"]),
    "text and a special token": ("The fox<|stop|> jumps", ["ox<|stop|>"]),
    "the beginning of a special token": ("The fox<|stop|> jumps", ["<|st"]),
    "a special token and text": ("The fox<|stop|> jumps over", ["<|stop|> j"]),
    "a special token that is not asked for": ("The fox<|stop|> jumps", ["lazy"]),
    "of two the first": ("The fox<|stop|> jumps", ["jumps", "<|stop|>"]),
    "text alone": ("The quick fox", [" fox"]),
    "within a token": ("The quick fox", ["uic"]),
    "characters of several bytes": ("a 漢字 b", ["字"]),
}


def stops(family: str, text: str, stop: list[str], folder: Path) -> Outcome:
    """The token after which generation ends is that of transformers; the text before the string comes out."""
    import torch
    from transformers import PreTrainedTokenizerFast, StopStringCriteria

    made = backend(family)
    reference: Any = StopStringCriteria(PreTrainedTokenizerFast(tokenizer_object=made), stop)
    ids = made.encode(text, add_special_tokens=False).ids
    ended = (end for end in range(1, len(ids) + 1) if bool(reference(torch.tensor([ids[:end]]), None)[0]))
    expected = next(ended, None)
    detokenizer, strings = Detokenizer(Vocabulary(made)), StopStrings(stop)
    found, out = None, ""
    for end, index in enumerate(ids, 1):
        piece = detokenizer.push(index)
        out += strings.push(piece, detokenizer.special_text(index), detokenizer.pending())
        if strings.stopped:
            found = end
            break
    else:
        out += strings.push(detokenizer.flush()) + strings.flush()
    if found != expected:
        return wrong(f"ended after token {found} instead of {expected} of {ids}")
    shown = made.decode(ids, skip_special_tokens=True)
    return right() if shown.startswith(out) and not any(string in out for string in stop) else wrong(out)


def cases() -> list[Case]:
    by_bytes = ("byte-level BPE", "Llama 3", "Llama 2", "Gemma", "Unigram with bytes")
    return [
        *(Case(f"{family}, 200 joined", functools.partial(joined, family, 200)) for family in FAMILIES),
        *(
            Case(f"{family}, {STREAMS} joined", functools.partial(joined, family, STREAMS), sweep=True)
            for family in FAMILIES
        ),
        *(Case(f"{family}, whole characters", functools.partial(whole_characters, family)) for family in by_bytes),
        *(Case(f"{family}, wrong bytes", functools.partial(wrong_bytes, family)) for family in by_bytes),
        *(
            Case(f"{family}, stopped by {name}", functools.partial(stops, family, *stop))
            for family in ("byte-level BPE", "Llama 2")
            for name, stop in STOPS.items()
        ),
    ]
