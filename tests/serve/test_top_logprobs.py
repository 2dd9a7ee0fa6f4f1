"""Logprobs of answers: which tokens are named, by which names, and who writes them."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from scripted_slots import ScriptedSlots
from servers import NAME, SlowSlots, of_bundle, running, scripted

from doge_deploy.runtime.logprobs import TokenLogprobs
from doge_deploy.serve.grammar.compiler import GrammarCompiler
from doge_deploy.serve.http import answers
from doge_deploy.serve.http.chunks import Chunks
from doge_deploy.serve.http.logprobs import CompletionLogprobs, chat_logprobs
from doge_deploy.serve.request import Event, PromptScored
from doge_deploy.serve.tokens import TokenTexts
from doge_deploy.text.tokenizer import Tokenizer


class Plain:
    """A tokenizer whose tokens are these bytes."""

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.tokens[ids[0]]

    def is_special_token(self, token: int) -> bool:
        return False


def texts(*tokens: bytes) -> TokenTexts:
    return TokenTexts(Plain(*tokens))  # type: ignore[arg-type]


def completion(entry: TokenLogprobs, *tokens: bytes) -> Any:
    return json.loads(CompletionLogprobs(texts(*tokens)).json([entry]))


class TestTheChosenToken:
    """There are up to `logprobs` + 1 entries, as in OpenAI's API: evaluation harnesses compare it with the best."""

    @pytest.mark.parametrize("top", [(), ((0, -0.5),), ((0, -0.5), (1, -1.5))])
    def test_is_among_those_of_a_completion(self, top: tuple[tuple[int, float], ...]) -> None:
        (found,) = completion(TokenLogprobs(2, -3.0, top), b"a", b"b", b"c")["top_logprobs"]
        assert found == {**{"ab"[token]: logprob for token, logprob in top}, "c": -3.0}

    def test_is_there_once_where_it_is_one_of_the_likeliest(self) -> None:
        (found,) = completion(TokenLogprobs(1, -1.5, ((0, -0.5), (1, -1.5))), b"a", b"b")["top_logprobs"]
        assert found == {"a": -0.5, "b": -1.5}

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_is_there_also_where_an_unlikely_one_was_drawn(self, tiny_bundle_all: Path, count: int) -> None:
        options = {"max_tokens": 20, "logprobs": count, "temperature": 1.5, "seed": 5, "echo": True}
        with running(of_bundle(tiny_bundle_all, slots=1, names=(NAME,))) as server:
            whole = server.complete("import", **options)["choices"][0]["logprobs"]
            chunks = server.stream("/v1/completions", prompt="import", **options)
        places = list(zip(whole["tokens"], whole["token_logprobs"], whole["top_logprobs"], strict=True))[1:]
        assert len(places) >= 20 and all(top[token] == logprob for token, logprob, top in places)
        sizes = {len(top) for _, _, top in places}
        assert sizes == {count, count + 1} - {0}, "neither always nor never one of the likeliest"
        if count:  # as lm-evaluation-harness reads it
            assert 0 < sum(logprob == max(top.values()) for _, logprob, top in places) < len(places)
        parts = [chunk["choices"][0]["logprobs"] or {} for chunk in chunks]
        assert {name: [one for part in parts for one in part.get(name, [])] for name in whole} == whole

    def test_is_not_added_in_a_chat(self) -> None:
        """There `top_logprobs` is the number of the likeliest."""
        (found,) = json.loads(chat_logprobs([TokenLogprobs(1, -3.0, ((0, -0.5),))], texts(b"a", b"b")))["content"]
        assert found["token"] == "b" and [one["token"] for one in found["top_logprobs"]] == ["a"]


class TestNames:
    def test_parts_of_characters_do_not_hide_each_other(self) -> None:
        """All of them are U+FFFD as text."""
        tokens = b"\xf0\x9f", b"\x90\xb6", b" \xe2", b"a"
        top = ((0, -0.1), (3, -3.0), (1, -9.0), (2, -10.0))
        found = completion(TokenLogprobs(0, -0.1, top), *tokens)
        assert found["tokens"] == [r"bytes:\xf0\x9f"]
        assert found["top_logprobs"] == [
            {r"bytes:\xf0\x9f": -0.1, "a": -3.0, r"bytes:\x90\xb6": -9.0, r"bytes:\x20\xe2": -10.0}
        ]

    @pytest.mark.parametrize(("chosen", "logprob"), [(0, -0.1), (1, -2.0), (2, -7.0)])
    def test_of_equal_names_the_likeliest_is_shown(self, chosen: int, logprob: float) -> None:
        """A token of a byte and one of a text may have the same one."""
        found = completion(TokenLogprobs(chosen, logprob, ((0, -0.1), (1, -2.0))), b"a", b"a", b"a")
        assert found["top_logprobs"] == [{"a": -0.1}] and found["token_logprobs"] == [logprob]

    def test_a_chat_has_the_bytes_beside_the_text(self) -> None:
        (found,) = json.loads(chat_logprobs([TokenLogprobs(0, -1.0, ())], texts(b"\xf0\x9f")))["content"]
        assert found == {"token": "\ufffd", "bytes": [0xF0, 0x9F], "logprob": -1.0, "top_logprobs": []}

    def test_of_an_answer_give_its_bytes(self, tiny_bundle: Path) -> None:
        """Streamed and whole; offsets stay those of characters."""
        said = Tokenizer.from_directory(tiny_bundle).ids("\N{DOG FACE}\N{DOG FACE}!", add_special_tokens=False)
        rule = lambda past: [*said, 1][len(past) - 1]  # noqa: E731
        with running(scripted(tiny_bundle, SlowSlots(1, rule=rule, vocab=1024, max_length=512))) as server:
            whole = server.complete([70], max_tokens=len(said), logprobs=2)["choices"][0]
            chunks = server.stream("/v1/completions", prompt=[70], max_tokens=len(said), logprobs=2)
        names, offsets = whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"]
        parts = [name for name in names if name.startswith("bytes:")]
        assert len(parts) == len(names) - 1 >= 4 and names[-1] == "!" and "\ufffd" not in "".join(names)
        data = b"".join(bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) for name in parts)
        assert data.decode() + "!" == whole["text"] and offsets[-1] == 2
        streamed = [chunk["choices"][0]["logprobs"] or {} for chunk in chunks]
        assert [one for part in streamed for one in part.get("tokens", [])] == names
        assert [one for part in streamed for one in part.get("top_logprobs", [])] == whole["logprobs"]["top_logprobs"]


ODD = (b'"', b"\\", b"\n\x00\x7f", "\u2028\x85\N{DOG FACE}".encode(), b"\xff", b"", b"plain")


def test_what_is_written_is_what_an_encoder_would_write() -> None:
    numbers = [-0.0, 0.0, -1e-300, -0.1, -1 / 3, -123456.789, -math.inf]
    top = tuple(zip(range(len(ODD)), numbers, strict=True))
    entries = [TokenLogprobs(token, logprob, top) for token, logprob in top]
    shown = dict(zip(range(len(ODD)), [*numbers[:5], -9999.0, -9999.0], strict=True))

    def entry(token: int) -> dict[str, Any]:
        text = ODD[token].decode("utf-8", "replace")
        return {"token": text, "bytes": list(ODD[token]), "logprob": shown[token]}

    content = [{**entry(one.token), "top_logprobs": [entry(token) for token, _ in one.top]} for one in entries]
    found = chat_logprobs(entries, texts(*ODD))
    assert json.loads(found) == {"content": content, "refusal": None}
    names = [r"bytes:\xff" if token == b"\xff" else token.decode() for token in ODD]
    written = CompletionLogprobs(texts(*ODD)).json([None, *entries], first=6)
    assert json.loads(written) == {
        "tokens": ["plain", *names],
        "token_logprobs": [None, *shown.values()],
        "top_logprobs": [None, *[dict(zip(names, shown.values(), strict=True))] * len(ODD)],
        "text_offset": [0, 5, 6, 7, 10, 13, 14, 14],
    }
    assert found.isascii() and written.isascii()


class TestTheEventLoop:
    """Is not held up: what takes long is written in the pool."""

    @pytest.fixture
    def threads(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
        """Names of the threads that did something."""
        found: dict[str, set[str]] = {"whole": set(), "prompt": set(), "token": set(), "tokenizer": set()}
        whole, of, begin = answers._whole, Chunks.of, GrammarCompiler.__init__

        def note(what: str) -> None:
            found[what].add(threading.current_thread().name.split("_")[0])

        def noted_whole(*arguments: Any) -> bytes:
            note("whole")
            return whole(*arguments)

        def noted_of(self: Chunks, index: int, event: Event) -> Any:
            note("prompt" if isinstance(event, PromptScored) else "token")
            return of(self, index, event)

        def noted_begin(self: GrammarCompiler, *arguments: Any) -> None:
            note("tokenizer")
            begin(self, *arguments)

        monkeypatch.setattr(answers, "_whole", noted_whole)
        monkeypatch.setattr(Chunks, "of", noted_of)
        monkeypatch.setattr(GrammarCompiler, "__init__", noted_begin)
        return found

    @pytest.mark.parametrize("stream", [False, True])
    def test_writes_no_long_answer(self, tiny_bundle: Path, threads: dict[str, set[str]], stream: bool) -> None:
        options = {"prompt": [7, 8, 9], "max_tokens": 4, "logprobs": 2, "echo": True, "stream": stream}
        with running(scripted(tiny_bundle, ScriptedSlots(1, vocab=1024))) as server:
            assert server.client.post("/v1/completions", json=options).status_code == 200
        assert threads["tokenizer"] == threads["prompt" if stream else "whole"] == {"doge-tokenizer"}
        assert "doge-tokenizer" not in threads["token"]

    def test_writes_what_is_short_itself(self, tiny_bundle: Path, threads: dict[str, set[str]]) -> None:
        with running(scripted(tiny_bundle, ScriptedSlots(1, vocab=1024))) as server:
            server.complete([7, 8, 9], max_tokens=4)
        assert len(threads["whole"]) == 1 and "doge-tokenizer" not in threads["whole"]
