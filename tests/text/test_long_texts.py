"""Long texts: other threads run while they are worked on, and what cannot fit is not worked on."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import doge_deploy
from doge_deploy.text import tokenizer as tokenizer_module
from doge_deploy.text.files import TOKENIZER_FILE
from doge_deploy.text.lengths import TooLongError
from doge_deploy.text.tokenizer import Tokenizer

DOGE_TINY = Path(doge_deploy.__file__).parent / "demo" / "doge-tiny"
LONG = "ab " * 300_000
EOT = "<|eot_id|>"


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DOGE_TINY)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def turns_of_another_thread(work: Callable[[], Any]) -> int:
    """How often another thread, which asks for a turn each millisecond, gets one during `work`."""
    turns, stop = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        while not turns:
            time.sleep(0.001)
        before = turns
        work()
        return turns - before
    finally:
        stop.set()
        counter.join()


@pytest.mark.parametrize(
    "work",
    [
        lambda tokenizer: tokenizer.encode(LONG),
        lambda tokenizer: tokenizer.render_chat(chat(LONG), literal=True),
        lambda tokenizer: tokenizer.render_chat(chat(LONG + EOT), literal=True),
    ],
    ids=["a text", "a conversation", "a conversation with a special token as text"],
)
def test_others_run_while_a_text_is_encoded(tokenizer: Tokenizer, work: Callable[[Tokenizer], Any]) -> None:
    """A third of a second at least: a thread that waits for Python's lock meanwhile gets a turn or two around it."""
    assert turns_of_another_thread(lambda: work(tokenizer)) > 50


def test_others_run_while_ids_are_decoded(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(LONG) * 3
    assert turns_of_another_thread(lambda: tokenizer.text_of(ids)) > 30


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", ["", "a", f"The {EOT} 漢字 <|begin_of_text|>\n", "déjà vu 👩‍👩‍👧 " * 50])
def test_ids_and_texts_are_those_of_single_calls(text: str, special: bool) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DOGE_TINY / TOKENIZER_FILE))
    tokenizer = Tokenizer.from_directory(DOGE_TINY)
    ids = backend.encode(text, add_special_tokens=special).ids
    assert tokenizer.ids(text, add_special_tokens=special) == ids
    assert tokenizer.text_of(ids) == backend.decode(ids, skip_special_tokens=False)


ROOM = 10
LONGEST = 25
"""Characters of doge-tiny's longest token."""


class TestRoom:
    @pytest.fixture
    def encoded(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The texts that were encoded."""
        texts: list[str] = []
        ids_of = tokenizer_module.ids_of

        def noting(backend: Any, text: str, **options: Any) -> list[int]:
            texts.append(text)
            return ids_of(backend, text, **options)

        monkeypatch.setattr(tokenizer_module, "ids_of", noting)
        monkeypatch.setattr("doge_deploy.text.literals.ids_of", noting)
        return texts

    @pytest.mark.parametrize("text", ["a" * (ROOM * LONGEST + 1), EOT * 30], ids=["letters", "special tokens"])
    @pytest.mark.parametrize(
        "work",
        [
            lambda tokenizer, text: tokenizer.encode(text, room=ROOM),
            lambda tokenizer, text: tokenizer.render_chat(chat(text), literal=True, room=ROOM),
            lambda tokenizer, text: tokenizer.render_chat(chat(text + EOT), literal=True, room=ROOM),
            lambda tokenizer, text: tokenizer.render_chat(chat(text), room=ROOM),
        ],
        ids=["text", "conversation", "with a special token as text", "as transformers takes it"],
    )
    def test_what_cannot_fit_is_not_encoded(
        self, tokenizer: Tokenizer, encoded: list[str], work: Callable[[Tokenizer, str], Any], text: str
    ) -> None:
        said = r"^(\d+) characters, which are (\d+) tokens or more; this model's maximum context length is 10 tokens$"
        with pytest.raises(TooLongError, match=said) as error:
            work(tokenizer, text)
        characters, fewest, _ = map(int, re.findall(r"\d+", str(error.value)))
        assert characters >= len(text) and fewest == -(-characters // LONGEST) > ROOM
        assert not encoded

    def test_what_may_fit_is_encoded(self, tokenizer: Tokenizer, encoded: list[str]) -> None:
        longest = max(tokenizer._backend.get_vocab(), key=len)
        assert len(longest) == LONGEST
        text = longest.replace("Ġ", " ").replace("Ċ", "\n") * ROOM
        assert len(text) == LONGEST * ROOM
        tokenizer.encode(text, room=ROOM)
        assert encoded == [text]

    def test_without_a_limit_everything_is_encoded(self, tokenizer: Tokenizer) -> None:
        assert len(tokenizer.encode("a" * 5000)) > 5000 / LONGEST

    def test_where_a_token_may_stand_for_anything_everything_is_encoded(self, tmp_path: Path) -> None:
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        backend.save(str(tmp_path / TOKENIZER_FILE))
        assert Tokenizer.from_directory(tmp_path).encode("a" * 5000, room=1) == [0]
