"""Texts that cannot fit are refused before they are encoded; where none need fit, all are taken."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Running, of_bundle, running

from doge_deploy.text import tokenizer as tokenizer_module
from doge_deploy.text.backend import ids_of

LONG = "ab " * 100_000
EOT = "<|eot_id|>"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, features_bundle: Path) -> Iterator[Running]:
    with running(of_bundle(tiny_bundle, features_bundle, names=("text", "features"))) as found:
        yield found


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the texts that were encoded."""
    lengths: list[int] = []

    def noting(backend: Any, text: str, **options: Any) -> list[int]:
        lengths.append(len(text))
        return ids_of(backend, text, **options)

    monkeypatch.setattr(tokenizer_module, "ids_of", noting)
    monkeypatch.setattr("doge_deploy.text.literals.ids_of", noting)
    return lengths


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": [LONG, "a"], "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt.0"),
        ("/v1/chat/completions", {"messages": chat(LONG)}, "messages"),
        ("/v1/chat/completions", {"messages": chat(LONG + EOT)}, "messages"),
        ("/v1/embeddings", {"input": LONG, "model": "features"}, "input"),
    ],
    ids=["a text", "several", "a conversation", "with a special token as text", "embeddings"],
)
def test_what_cannot_fit_is_refused_before_it_is_encoded(
    server: Running, encoded: list[int], path: str, body: dict[str, Any], param: str
) -> None:
    error = server.post(path, 400, **{"model": "text", **body})["error"]
    assert re.match(
        rf"{param}: 3\d{{5}} characters, which are 120\d\d tokens or more; .* 512 tokens$", error["message"]
    )
    assert (error["param"], error["code"]) == (param, "context_length_exceeded") and not encoded


def test_what_might_have_fitted_is_refused_with_both_numbers(server: Running, encoded: list[int]) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "b" * 2000}),
        ("/v1/chat/completions", {"messages": chat("b" * 2000)}),
        ("/v1/embeddings", {"input": "b" * 2000, "model": "features"}),
    ):
        error = server.post(path, 400, **{"model": "text", **body})["error"]
        assert re.search(r": \d+ tokens; .* 512 tokens$", error["message"])
        assert error["code"] == "context_length_exceeded"
    assert len(encoded) == 3


def test_no_more_prompts_are_encoded_than_may_ever_wait(server: Running, encoded: list[int]) -> None:
    error = server.post("/v1/completions", 400, model="text", prompt=["a"] * 60, n=5)["error"]
    assert error["param"] == "n" and not encoded


def test_ids_of_a_text_that_need_not_fit(server: Running) -> None:
    tokenizer = server.served.texts["text"].tokenizer
    for body, ids in (
        ({"prompt": LONG}, tokenizer.encode(LONG)),
        ({"prompt": ""}, tokenizer.encode("")),
        ({"messages": chat(LONG)}, tokenizer.render_chat(chat(LONG))),
    ):
        answer = server.client.post("/tokenize", json={"model": "text", **body})
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == {"tokens": ids, "count": len(ids), "max_model_len": 512}
        assert " " not in answer.text
