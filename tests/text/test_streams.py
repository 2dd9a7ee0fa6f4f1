"""The rules of streams, each broken on purpose; tests/hard_inputs compares streams of every family with `decode`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hard_inputs import kind_03_streams as streams

from doge_deploy.text.streams import Detokenizer, Vocabulary


def test_runs_of_byte_tokens_must_be_held_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert streams.joined("Llama 2", 300, tmp_path).verdict == "right"
    made = Vocabulary.__init__

    def without(self: Vocabulary, backend: object) -> None:
        made(self, backend)  # type: ignore[arg-type]
        self.joins_bytes = False

    monkeypatch.setattr(Vocabulary, "__init__", without)
    assert streams.joined("Llama 2", 300, tmp_path).verdict == "wrong"


def test_the_beginning_of_a_text_must_stay_in_the_window(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forget(self: Detokenizer, kept: int, held: int) -> None:
        if held == 0:
            self._window, self._given = [], 0

    monkeypatch.setattr(Detokenizer, "_shorten", forget)
    assert streams.joined("BERT", 300, tmp_path).verdict == "wrong"


@pytest.mark.parametrize("family", ["byte-level BPE", "Llama 2", "BERT", "T5"])
def test_the_window_stays_short(family: str) -> None:
    made = streams.backend(family)
    detokenizer = Detokenizer(Vocabulary(made))
    for index in made.encode("the fox jumps over the dog. " * 200, add_special_tokens=False).ids:
        detokenizer.push(index)
        assert len(detokenizer._window) < 100
