"""What a server must do, line by line; the numbers are those of docs/serve.md."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from scripted_slots import ScriptedSlots
from servers import NAME, Running, SlowSlots, of_bundle, running, scripted

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.backend import open_backend
from doge_deploy.runtime.generate import GenerationOptions, TextGenerator
from doge_deploy.serve.http import schemas
from doge_deploy.serve.http.metrics import SECONDS, Metrics
from doge_deploy.serve.logs import configure
from doge_deploy.serve.scheduler import Limits
from doge_deploy.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Tell me about lists."}]


@pytest.fixture(scope="module")
def server(tiny_bundle_last: Path) -> Iterator[Running]:
    """doge-tiny, four slots."""
    with running(of_bundle(tiny_bundle_last, slots=4, names=(NAME,))) as found:
        yield found


def words(tiny_bundle: Path, *tokens: str) -> list[int]:
    backend = Tokenizer.from_directory(tiny_bundle)
    return [backend.ids(token, add_special_tokens=False)[0] for token in tokens]


def slots_saying(tiny_bundle: Path, tokens: list[int], prompt: int, **options: Any) -> SlowSlots:
    """Slots that answer a prompt of `prompt` tokens with `tokens`, the last one for ever."""
    vocab = open_bundle(tiny_bundle).manifest.facts.vocab_size

    def rule(history: list[int]) -> int:
        return tokens[min(max(len(history) - prompt, 0), len(tokens) - 1)]

    return SlowSlots(options.pop("slots", 1), rule=rule, vocab=vocab, max_length=512, **options)


def chat_text(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


def generated(bundle_path: Path, prompt_ids: list[int], **options: Any) -> str:
    """What `doge-deploy generate` makes of the same prompt alone."""
    bundle = open_bundle(bundle_path)
    ends = {"eos_token_id": list(bundle.manifest.facts.eos_token_ids)}
    config = bundle.read_json("generation_config.json")
    merged = GenerationOptions.merged(ends, config, options)
    runner = open_backend(bundle, threads=1)
    stream = TextGenerator(runner, Tokenizer.from_directory(bundle.path), merged).stream(prompt_ids)
    return "".join(stream)


class TestText:
    """1 and 2: what comes out of a stream is the text, whole characters, and nothing of a stop text."""

    def test_a_character_that_spans_tokens_is_withheld_until_it_is_whole(self, tiny_bundle: Path) -> None:
        ids = Tokenizer.from_directory(tiny_bundle).ids("\N{DOG FACE}é", add_special_tokens=False)
        assert len(ids) > 2
        prompt = words(tiny_bundle, "a")
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, [*ids, 1], len(prompt)))) as server:
            chunks = server.stream("/v1/completions", prompt=prompt, max_tokens=20)
            pieces = [chunk["choices"][0]["text"] for chunk in chunks]
            assert "".join(pieces) == "\N{DOG FACE}é" and all("\ufffd" not in piece for piece in pieces)
            assert server.complete(prompt, max_tokens=20)["choices"][0]["text"] == "\N{DOG FACE}é"

    def test_invalid_bytes_at_the_end_come_out_as_replacement_characters(self, tiny_bundle: Path) -> None:
        ids = Tokenizer.from_directory(tiny_bundle).ids("\N{DOG FACE}", add_special_tokens=False)
        prompt = words(tiny_bundle, "a")
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, [ids[0], 1], len(prompt)))) as server:
            chunks = server.stream("/v1/completions", prompt=prompt, max_tokens=20)
            whole = server.complete(prompt, max_tokens=20)["choices"][0]["text"]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole == "\ufffd"

    @pytest.mark.parametrize("seed", range(6))
    def test_a_stream_joined_is_the_text(self, server: Running, seed: int) -> None:
        options = {"messages": MESSAGES, "max_tokens": 60, "temperature": 1.2, "seed": seed}
        whole = server.post("/v1/chat/completions", **options)["choices"][0]
        chunks = server.stream("/v1/chat/completions", **options)
        assert chat_text(chunks) == whole["message"]["content"]
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]

    def test_nothing_of_a_stop_text_comes_out_and_nothing_behind_it(self, tiny_bundle: Path) -> None:
        prompt = words(tiny_bundle, "a")
        text = "one two three four"
        ids = Tokenizer.from_directory(tiny_bundle).ids(text, add_special_tokens=False)
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, ids, len(prompt)))) as server:
            for stop in ("wo thr", "e four", "two three four"):
                answer = server.complete(prompt, max_tokens=len(ids), stop=[stop])["choices"][0]
                assert answer["text"] == text[: text.index(stop)] and answer["finish_reason"] == "stop"
                chunks = server.stream("/v1/completions", prompt=prompt, max_tokens=len(ids), stop=stop)
                assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["text"]

    def test_a_stop_text_may_be_that_of_a_special_token(self, tiny_bundle: Path) -> None:
        prompt = words(tiny_bundle, "a")
        tokenizer = Tokenizer.from_directory(tiny_bundle)
        special = next(token for token in range(3, 70) if tokenizer.text_of([token]).startswith("<|"))
        ids = [*tokenizer.ids("one", add_special_tokens=False), special, *words(tiny_bundle, "b")]
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, ids, len(prompt)))) as server:
            whole = server.complete(prompt, max_tokens=len(ids))["choices"][0]
            assert whole["text"] == "oneb" and whole["finish_reason"] == "length"
            answer = server.complete(prompt, max_tokens=len(ids), stop=[tokenizer.text_of([special])])["choices"][0]
            assert answer["text"] == "one" and answer["finish_reason"] == "stop"

    def test_no_more_is_withheld_than_what_may_be_a_stop_text(self, tiny_bundle: Path) -> None:
        prompt = words(tiny_bundle, "a")
        ids = Tokenizer.from_directory(tiny_bundle).ids("one two", add_special_tokens=False)
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, ids, len(prompt)))) as server:
            chunks = server.stream("/v1/completions", prompt=prompt, max_tokens=len(ids), stop=["twenty"])
            texts = [chunk["choices"][0]["text"] for chunk in chunks]
            assert "".join(texts) == "one two"
            assert "".join(texts[:1]) != ""  # the first token is no beginning of it, and comes out at once


class TestClientsThatLeave:
    """3: the slot of a client that is gone is free within one step, and nobody else is touched."""

    @pytest.fixture
    def slow(self, tiny_bundle: Path) -> Iterator[Running]:
        prompt = [words(tiny_bundle, "a")[0]]
        slots = slots_saying(tiny_bundle, words(tiny_bundle, "b"), len(prompt), slots=2, seconds=0.05)
        with running(scripted(tiny_bundle, slots, Limits(step_tokens=4, alone_tokens=4))) as found:
            yield found

    def leave(self, server: Running, when: str, *, stream: bool) -> None:
        body = json.dumps({"prompt": [5] * (400 if when == "prefill" else 3), "max_tokens": 400, "stream": stream})
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection = socket.create_connection(server.address)
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        states = {"queued": "waiting", "prefill": "prefilling", "decode": "decoding"}
        server.wait_until(lambda: bool(getattr(server.scheduler, states[when])))
        connection.close()

    def assert_the_others_are_whole(self, server: Running, others: list[Future[Any]]) -> None:
        """They run until this is asked."""
        assert not any(other.done() for other in others)
        slots = server.scheduler.runner
        assert isinstance(slots, SlowSlots)
        slots.over.set()
        for other in others:
            (choice,), usage = other.result()["choices"], other.result()["usage"]
            assert choice["text"] == "b" * (usage["completion_tokens"] - 1) and choice["finish_reason"] == "stop"

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("when", ["prefill", "decode"])
    def test_running(self, slow: Running, when: str, stream: bool) -> None:
        with ThreadPoolExecutor() as pool:
            other = pool.submit(slow.complete, [7, 8], max_tokens=500)
            slow.wait_until(lambda: slow.scheduler.running == 1)
            self.leave(slow, when, stream=stream)
            slow.wait_until(lambda: slow.scheduler.counters.finished.get("cancelled") == 1)
            self.assert_the_others_are_whole(slow, [other])
        assert slow.scheduler.table.busy == 0

    @pytest.mark.parametrize("stream", [True, False])
    def test_queued(self, slow: Running, stream: bool) -> None:
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(slow.complete, [7, 8], max_tokens=500) for _ in range(2)]
            slow.wait_until(lambda: slow.scheduler.running == 2)
            self.leave(slow, "queued", stream=stream)
            slow.wait_until(lambda: slow.scheduler.counters.finished.get("cancelled") == 1)
            self.assert_the_others_are_whole(slow, others)


class TestEnds:
    """4: one usage chunk, only if it was asked for; why a text ended."""

    def test_usage_comes_once_with_empty_choices(self, server: Running) -> None:
        options = {"messages": MESSAGES, "max_tokens": 5}
        plain = server.stream("/v1/chat/completions", **options)
        assert all(chunk["choices"] and "usage" not in chunk for chunk in plain)
        chunks = server.stream("/v1/chat/completions", **options, stream_options={"include_usage": True})
        (usage,) = (chunk for chunk in chunks if not chunk["choices"])
        assert usage is chunks[-1] and usage["usage"]["completion_tokens"] == 5
        assert all(chunk["usage"] is None for chunk in chunks[:-1])

    @pytest.mark.parametrize("texts", [1, 2])
    def test_usage_in_every_chunk_counts_the_tokens_so_far(self, tiny_bundle: Path, texts: int) -> None:
        """vLLM's continuous_usage_stats, which GuideLLM sends with every stream."""
        (word,) = words(tiny_bundle, "a")
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, [word], 2, slots=2))) as server:
            options = {"prompt": [7, 8], "max_tokens": 5, "temperature": 0, "ignore_eos": True, "n": texts}
            stats = {"include_usage": True, "continuous_usage_stats": True}
            chunks = server.stream("/v1/completions", **options, stream_options=stats)
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts) and counts[-1] == 5 * texts
            assert {*range(2, 5 * texts)} <= {*counts}
            assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}
            # without include_usage, and where it is false, there is none, as in vLLM
            for one in ({"continuous_usage_stats": True}, {"include_usage": True, "continuous_usage_stats": False}):
                chunks = server.stream("/v1/completions", **options, stream_options=one)
                assert not any(chunk.get("usage") for chunk in chunks if chunk["choices"])

    def test_eos_is_a_stop_and_what_is_cut_off_a_length(self, tiny_bundle: Path) -> None:
        prompt = words(tiny_bundle, "a")
        said = words(tiny_bundle, "b", "c")
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, [*said, 1], len(prompt)))) as server:
            for length, reason, text in ((3, "stop", "bc"), (2, "length", "bc"), (1, "length", "b"), (9, "stop", "bc")):
                answer = server.complete(prompt, max_tokens=length)["choices"][0]
                assert (answer["finish_reason"], answer["text"]) == (reason, text)


class TestLogprobs:
    """5: one entry a token, streamed and not, of the distribution before the temperature."""

    def test_streamed_and_whole_are_the_same(self, server: Running) -> None:
        options = {"messages": MESSAGES, "max_tokens": 12, "logprobs": True, "top_logprobs": 3, "seed": 1}
        options["temperature"] = 1.5
        server.post(
            "/v1/chat/completions", **options
        )  # from now on the prompt is in a slot, and the calls are the same
        whole = server.post("/v1/chat/completions", **options)["choices"][0]["logprobs"]["content"]
        chunks = server.stream("/v1/chat/completions", **options)
        streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
        assert streamed == whole and len(whole) == 12
        for entry in whole:
            assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3
            assert entry["top_logprobs"][0]["logprob"] >= entry["logprob"] - 1e-12
            assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]

    def test_tokens_without_text_have_them_in_a_stream_too(self, tiny_bundle: Path) -> None:
        ids = Tokenizer.from_directory(tiny_bundle).ids("\N{DOG FACE}", add_special_tokens=False)
        prompt = words(tiny_bundle, "a")
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, [*ids, 1], len(prompt)))) as server:
            options = {"prompt": prompt, "max_tokens": 20, "logprobs": 1}
            whole = server.complete(**options)["choices"][0]["logprobs"]["tokens"]
            chunks = server.stream("/v1/completions", **options)
        streamed = [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {}).get("tokens", [])]
        assert streamed == whole and len(whole) == len(ids) + 1

    def test_the_temperature_does_not_change_them(self, server: Running) -> None:
        server.post(
            "/v1/chat/completions", messages=MESSAGES, max_tokens=1
        )  # then both calls find the prompt in a slot
        found = [
            server.post(
                "/v1/chat/completions",
                messages=MESSAGES,
                max_tokens=1,
                logprobs=True,
                top_logprobs=5,
                temperature=temperature,
            )["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            for temperature in (0, 5.0)
        ]
        assert found[0] == found[1]
        assert sum(math.exp(entry["logprob"]) for entry in found[0]) <= 1

    def test_top_logprobs_0_is_legal(self, server: Running) -> None:
        options = {"messages": MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": 0}
        content = server.post("/v1/chat/completions", **options)["choices"][0]["logprobs"]["content"]
        assert [entry["top_logprobs"] for entry in content] == [[], []]

    def test_an_echoed_prompt_is_scored(self, tiny_bundle_all: Path) -> None:
        with running(of_bundle(tiny_bundle_all, slots=1, names=(NAME,))) as server:
            answer = server.complete("Once upon a time", max_tokens=0, echo=True, logprobs=1)["choices"][0]
            scores = answer["logprobs"]["token_logprobs"]
            assert answer["text"] == "Once upon a time" and scores[0] is None and all(score < 0 for score in scores[1:])
            longer = server.complete("Once upon a time", max_tokens=3, echo=True, logprobs=1)["choices"][0]
            assert longer["logprobs"]["token_logprobs"][: len(scores)] == scores
            assert (
                longer["text"].startswith("Once upon a time") and len(longer["logprobs"]["tokens"]) == len(scores) + 3
            )

    def test_echo_with_logprobs_needs_the_logits_of_the_prompt(self, tiny_bundle: Path) -> None:
        with running(scripted(tiny_bundle, ScriptedSlots(1, all_logits=False))) as server:
            error = server.post("/v1/completions", 400, prompt="a", echo=True, logprobs=1, max_tokens=0)["error"]
        assert "export it with --logits all" in error["message"] and error["param"] == "echo"

    @pytest.mark.parametrize(
        "prompt", ["def f(x):\n    return x", list(range(20, 532))], ids=["short", "fills-the-slot"]
    )
    def test_a_default_bundle_scores_a_prompt_as_one_with_all_logits(
        self, server: Running, tiny_bundle_all: Path, prompt: Any
    ) -> None:
        asked = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0}
        with running(of_bundle(tiny_bundle_all)) as other:
            expected = other.complete(**asked)["choices"][0]["logprobs"]
        found = server.complete(**asked)["choices"][0]["logprobs"]
        assert found["tokens"] == expected["tokens"] and found["token_logprobs"][0] is None
        np.testing.assert_allclose(found["token_logprobs"][1:], expected["token_logprobs"][1:], atol=1e-4)


class TestBatched:
    """6 and 7: an answer is the one that the request gets alone."""

    def test_many_at_once_give_what_generate_gives_alone(self, server: Running, tiny_bundle: Path) -> None:
        tokenizer = Tokenizer.from_directory(tiny_bundle)
        prompts = [f"def f{number}(x):\n    return x + {number}\n" * (1 + number % 5) for number in range(24)]
        options = [
            {"max_tokens": 5 + n % 30, **({"temperature": 0.9, "seed": 100 + n} if n % 2 else {"temperature": 0})}
            for n in range(24)
        ]
        expected = []
        for prompt, option in zip(prompts, options, strict=True):
            names: dict[str, Any] = {"max_new_tokens": option["max_tokens"], "do_sample": "seed" in option}
            if "seed" in option:
                names |= {"temperature": 0.9, "seed": option["seed"]}
            expected.append(generated(tiny_bundle, tokenizer.encode(prompt), **names))
        with ThreadPoolExecutor(8) as pool:
            jobs = [
                pool.submit(server.complete, prompt, **option) for prompt, option in zip(prompts, options, strict=True)
            ]
            texts = [job.result()["choices"][0]["text"] for job in jobs]
        assert texts == expected

    def test_a_seed_gives_the_same_text_and_no_seed_a_fresh_one(self, server: Running) -> None:
        options = {"messages": MESSAGES, "max_tokens": 30, "temperature": 1.5}

        def text(**more: Any) -> str:
            return str(server.post("/v1/chat/completions", **options, **more)["choices"][0]["message"]["content"])

        assert text(seed=3) == text(seed=3) != text(seed=4)
        assert text() != text()

    def test_choices_are_different_and_each_is_reproducible(self, server: Running) -> None:
        options = {"messages": MESSAGES, "max_tokens": 20, "temperature": 1.5, "seed": 5, "n": 3}
        first, second = (server.post("/v1/chat/completions", **options) for _ in range(2))
        texts = [choice["message"]["content"] for choice in first["choices"]]
        assert len(set(texts)) == 3 and texts == [choice["message"]["content"] for choice in second["choices"]]
        assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
        assert first["usage"]["completion_tokens"] <= 60
        chunks = server.stream("/v1/chat/completions", **options)
        streamed = ["", "", ""]
        for chunk in chunks:
            choice = chunk["choices"][0]
            streamed[choice["index"]] += choice["delta"].get("content", "")
        assert streamed == texts

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_choices_share_counts_once(self, server: Running, stream: bool) -> None:
        """A prompt that one choice computed was computed, however many choices found it then."""

        def usage(prompts: list[list[int]]) -> tuple[int, int]:
            options = {"prompt": prompts, "n": 4, "max_tokens": 2}
            if stream:
                found = server.stream("/v1/completions", **options, stream_options={"include_usage": True})[-1]
            else:
                found = server.post("/v1/completions", **options)
            return found["usage"]["prompt_tokens"], found["usage"]["prompt_tokens_details"]["cached_tokens"]

        prompts = [[70 + stream, *range(start, start + 39)] for start in (100, 200)]
        prompts[1][0] = 72 + stream
        assert usage(prompts[:1]) == (40, 0)
        assert usage(prompts[:1]) == (40, 39)
        assert usage(prompts) == (80, 39)


class TestLengths:
    """8: too long a prompt is refused with both numbers; what does not fit into the answer is clipped."""

    def test_a_prompt_that_is_too_long(self, server: Running) -> None:
        error = server.post("/v1/completions", 400, prompt=[5] * 513)["error"]
        assert "513 tokens" in error["message"] and "512 tokens" in error["message"]

    def test_max_tokens_beyond_the_room_is_clipped(self, server: Running) -> None:
        answer = server.complete([70] * 505, max_tokens=1000, temperature=0, logit_bias={"1": -100, "5": -100})
        assert answer["usage"]["completion_tokens"] == 8  # the last one needs no place
        assert answer["choices"][0]["finish_reason"] == "length"


ILLEGAL = [
    ('{"prompt": "a"', "not valid JSON"),
    ('{"prompt": "a", "temperature": NaN}', "temperature"),
    ('{"prompt": "a", "temperature": -1}', "temperature"),
    ('{"prompt": "a", "temperature": 1e999}', "temperature"),
    ('{"prompt": "a", "temperature": "hot"}', "temperature"),
    ('{"prompt": "a", "temperature": "0.5"}', "temperature"),
    ('{"prompt": "a", "temperature": true}', "temperature"),
    ('{"prompt": "a", "top_p": 2}', "top_p"),
    ('{"prompt": "a", "top_k": 1.5}', "top_k"),
    ('{"prompt": "a", "max_tokens": -5}', "max_tokens"),
    ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    ('{"prompt": "a", "max_tokens": true}', "max_tokens"),
    ('{"prompt": "a", "n": 0}', "n:"),
    ('{"prompt": "a", "n": 1000}', "n:"),
    ('{"prompt": "a", "seed": 99999999999999999999999}', "seed"),
    ('{"prompt": "a", "stop": [""]}', "stop"),
    ('{"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}', "stop"),
    ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    ('{"prompt": "a", "logit_bias": {"5": 101}}', "logit_bias"),
    ('{"prompt": "a", "logprobs": 21}', "logprobs"),
    ('{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options"),
    ('{"prompt": "a", "presence_penalty": 3}', "presence_penalty"),
    ('{"prompt": "a", "best_of": 3}', "best_of"),
    ('{"prompt": "a", "unknown_field": 3}', "unknown_field"),
    ('{"prompt": "a", "model": "gpt-4"}', "gpt-4"),
    ('{"prompt": "\\ud800"}', ""),
    ('{"prompt": []}', "prompt"),
    ('{"prompt": [[]]}', "prompt"),
    ('{"prompt": [-1]}', "prompt"),
    ('{"prompt": [99999999]}', "99999999"),
    ('{"prompt": null}', "prompt"),
    ('{"prompt": {"a": 1}}', "prompt"),
    ("{}", "prompt"),
    ("[]", ""),
    ("null", ""),
    ('"text"', ""),
    ("", ""),
    ("[" * 100_000, ""),
    ('{"a":' * 20_000, ""),
    ('{"prompt": "a", "guided_regex": "("}', "guided_regex: "),
    ('{"prompt": "a", "guided_grammar": "start: \\"a\\" ~"}', "guided_grammar: "),
    ('{"prompt": "a", "guided_choice": []}', "guided_choice"),
    ('{"prompt": "a", "guided_choice": ["a"], "guided_regex": "b"}', "cannot both"),
    ('{"prompt": "a", "response_format": {"type": "json_schema"}}', "json_schema"),
    ('{"prompt": "a", "guided_json": {"type": "nonsense"}}', "guided_json: "),
    ('{"prompt": "a", "guided_json": {"$ref": "#"}}', "guided_json: "),
    ('{"prompt": "a", "guided_json": {"$ref": "http://127.0.0.1:9/x"}}', "guided_json: "),
    # what is wrong with each of a million entries is not told for each
    ('{"prompt": [' + '"",' * 400_000 + '""]}', "at most 64"),
    ('{"prompt": [' + "0.5," * 400_000 + "1]}", "at most 64"),
    ('{"prompt": [' + "5," * 70_000 + '5], "max_tokens": 1}', "at most"),
    ('{"prompt": "a", "logit_bias": {' + ",".join(f'"{n}": 200' for n in range(50_000)) + "}}", "at most 1024"),
    ('{"prompt": "a", "guided_choice": [' + '"",' * 400_000 + '""]}', "at most 4096"),
    ("{" + ",".join(f'"f{n}": 1' for n in range(50_000)) + "}", "at most 128"),
]


class TestIllegal:
    """9: whatever is sent, the answer is a 4xx that names the field, and never a 500."""

    @pytest.mark.parametrize(("body", "named"), ILLEGAL, ids=[body[:40] for body, _ in ILLEGAL])
    def test_a_body(self, server: Running, body: str, named: str) -> None:
        response = server.client.post(
            "/v1/completions",
            content=body.encode("utf-8", "surrogatepass"),
            headers={"Content-Type": "application/json"},
        )
        assert 400 <= response.status_code < 500, response.text
        error = response.json()["error"]
        assert named in error["message"] and error["type"] and "\n" not in error["message"]

    @pytest.mark.parametrize(
        "message",
        [
            {"role": "user"},
            {"role": "user", "content": 5},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            {"role": "", "content": "a"},
            {"role": "user", "content": "a", "tool_calls": [{"id": 1}]},
            {"role": "user", "content": [{"type": "text"}] * 2000},
        ],
    )
    def test_a_message(self, server: Running, message: Any) -> None:
        assert "messages" in server.post("/v1/chat/completions", 400, messages=[message])["error"]["message"]

    def test_a_grammar_that_takes_long_is_stopped(self, server: Running) -> None:
        """With llguidance's own limits it takes seconds for a token, in which nobody else gets one."""
        answer = server.client.post("/v1/completions", json={"prompt": "a", "guided_regex": "(a{1000}){1000}"})
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400 and ("make it simpler" in message or "structured output failed" in message)

    def test_a_null_character_is_text(self, server: Running) -> None:
        assert server.complete("a\x00b", max_tokens=1)["usage"]["completion_tokens"] == 1

    def test_ten_megabytes(self, server: Running) -> None:
        response = server.client.post("/v1/completions", json={"prompt": "a" * 10_000_000})
        assert response.status_code == 413 and "larger than" in response.json()["error"]["message"]

    def test_ten_megabytes_that_do_not_say_so(self, server: Running) -> None:
        def chunks() -> Iterator[bytes]:
            for _ in range(160):
                yield b" " * 65536

        try:
            response = server.client.post("/v1/completions", content=chunks())
        except httpx.WriteError:
            return  # the server has closed the connection
        assert response.status_code == 413

    def test_other_paths_and_methods(self, server: Running) -> None:
        assert server.client.get("/nothing").status_code == 404
        response = server.client.get("/v1/completions")
        assert response.status_code == 405 and response.json()["error"]["message"]

    def test_neutral_values_are_accepted(self, server: Running) -> None:
        neutral = {"n": 1, "logit_bias": {}, "user": "u", "metadata": {"a": "b"}, "best_of": 1, "suffix": None}
        neutral |= {"safety_identifier": "s", "prompt_cache_key": "k"}
        assert server.complete("a", max_tokens=1, **neutral)["choices"]
        chat = {"tools": [], "tool_choice": "none", "store": False, "response_format": {"type": "text"}}
        assert server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, **chat)["choices"]


class TestPrompts:
    """10 and 11: a user's text stays text; what a template refuses is a 400 with its own words."""

    def test_text_of_a_special_token_stays_text(self, server: Running) -> None:
        typed = "a <|end_of_text|> b"
        tokens = server.post("/tokenize", messages=[{"role": "user", "content": typed}])["tokens"]
        assert 1 not in tokens
        assert typed in server.post("/detokenize", tokens=tokens)["prompt"]

    def test_bos_is_there_once(self, server: Running) -> None:
        assert server.post("/tokenize", messages=MESSAGES)["tokens"].count(0) == 1
        assert server.post("/tokenize", prompt="a")["tokens"].count(0) == 1
        assert server.post("/tokenize", prompt="a", add_special_tokens=False)["tokens"].count(0) == 0

    def test_detokenize_gives_the_text_back(self, server: Running) -> None:
        tokens = server.post("/tokenize", prompt="héllo \N{DOG FACE}", add_special_tokens=False)["tokens"]
        assert server.post("/detokenize", tokens=tokens)["prompt"] == "héllo \N{DOG FACE}"

    @pytest.mark.parametrize(
        ("template", "said"),
        [
            ("{{ raise_exception('only user and assistant') }}", "only user and assistant"),
            ("{{ messages[0].nothing.more }}", "chat template"),
            ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "more than"),
        ],
    )
    def test_a_template_that_refuses(self, tiny_bundle: Path, tmp_path: Path, template: str, said: str) -> None:
        slots = slots_saying(tiny_bundle, [70], 1)
        served = scripted(tiny_bundle, slots)
        model = served.texts[NAME]
        model.tokenizer = Tokenizer(model.tokenizer._backend, {}, template, tmp_path)
        with running(served) as server:
            error = server.post("/v1/chat/completions", 400, messages=MESSAGES)["error"]
            assert said in error["message"] and error["param"] == "messages"


class TestAdmission:
    """12: a full queue answers at once, and a burst is bounded."""

    def test_a_full_queue_is_a_429_with_a_time_to_wait(self, tiny_bundle: Path) -> None:
        slots = slots_saying(tiny_bundle, [70], 1, seconds=0.05)
        with running(scripted(tiny_bundle, slots, Limits(queue_requests=2))) as server, ThreadPoolExecutor() as pool:
            accepted = [pool.submit(server.complete, [7], max_tokens=400)]
            server.wait_until(lambda: server.scheduler.running == 1)  # else three might wait at once
            accepted += [pool.submit(server.complete, [7], max_tokens=400) for _ in range(2)]
            server.wait_until(lambda: len(server.scheduler.waiting) == 2)
            response = server.client.post("/v1/completions", json={"prompt": [7]})
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full" and not any(job.done() for job in accepted)
            slots.over.set()
            assert all(job.result()["choices"][0]["finish_reason"] == "stop" for job in accepted)

    def test_a_burst_is_answered_or_refused_whole(self, tiny_bundle: Path) -> None:
        slots = slots_saying(tiny_bundle, [70], 1, slots=4)
        with running(scripted(tiny_bundle, slots, Limits(queue_requests=50))) as server, ThreadPoolExecutor(64) as pool:
            send = lambda _: server.client.post("/v1/completions", json={"prompt": [7], "max_tokens": 3}).status_code  # noqa: E731
            found = list(pool.map(send, range(300)))
        assert set(found) <= {200, 429} and found.count(200) >= 50
        assert server.scheduler.idle and server.scheduler.table.busy == 0


class TestErrorsWithin:
    """13: an error in a stream is an event; others go on."""

    def test_a_row_with_nan_fails_alone(self, tiny_bundle: Path) -> None:
        slots = slots_saying(tiny_bundle, [70], 1, slots=2, seconds=0.002)
        slots.nan_after.add((7, 70, 70, 70))
        with running(scripted(tiny_bundle, slots)) as server, ThreadPoolExecutor() as pool:
            other = pool.submit(server.complete, [8], max_tokens=50)
            chunks = server.stream("/v1/completions", prompt=[7], max_tokens=50)
            assert "NaN" in chunks[-1]["error"]["message"] and len(chunks) == 4
            assert other.result()["usage"]["completion_tokens"] == 50
            error = server.post("/v1/completions", 500, prompt=[7], max_tokens=50)["error"]
            assert "NaN" in error["message"] and error["type"] == "server_error"

    @pytest.mark.parametrize("length", [0, 3])
    def test_a_prompt_that_is_scored_with_nan_fails_alone(self, tiny_bundle: Path, length: int) -> None:
        slots = slots_saying(tiny_bundle, [70], 1, slots=2)
        slots.nan_after.add((7, 8))
        asked = {"prompt": [7, 8, 9], "max_tokens": length, "echo": True, "logprobs": 0}
        with running(scripted(tiny_bundle, slots)) as server:
            error = server.post("/v1/completions", 500, **asked)["error"]
            assert "after 2 tokens hold NaN" in error["message"] and error["type"] == "server_error"
            (chunk,) = server.stream("/v1/completions", **asked)
            assert chunk["error"] == error
            assert server.complete([7], max_tokens=2)["usage"]["completion_tokens"] == 2
            assert server.scheduler.counters.finished == {"error": 2, "length": 1}

    def test_what_comes_when_all_was_given_up_is_told_so(self, tiny_bundle: Path) -> None:
        """At shutdown: a request that was still being tokenized would run on and be cut off."""
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, [70], 1))) as server:
            server.served.inboxes[NAME].fail("the server is shutting down")
            error = server.post("/v1/completions", 503, prompt=[7], max_tokens=50)["error"]
            assert error["code"] == "shutting_down" and server.scheduler.idle


class TestSecurity:
    """15: keys, ids, and nothing of a prompt in the log."""

    def test_a_key_is_needed_where_there_are_keys(self, tiny_bundle: Path) -> None:
        with running(scripted(tiny_bundle, slots_saying(tiny_bundle, [70], 1)), api_keys=(b"right",)) as server:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
                response = server.client.post("/v1/completions", json={"prompt": [7]}, headers=headers)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            headers = {"Authorization": "Bearer right"}
            assert server.client.post("/v1/completions", json={"prompt": [7]}, headers=headers).status_code == 200
            assert server.client.get("/metrics").status_code == 401
            parts = re.findall(r'(?:src|href)="(/page/[^"]+)"', server.client.get("/").text)
            opened = ["/health", "/ready", "/", *parts]  # the page asks for the key itself
            assert len(parts) == 2 and {server.client.get(path).status_code for path in opened} == {200}

    def test_a_request_has_an_id(self, server: Running) -> None:
        assert server.client.get("/health").headers["x-request-id"]
        given = server.client.get("/health", headers={"X-Request-Id": "mine-7"})
        assert given.headers["x-request-id"] == "mine-7"
        assert server.client.get("/health", headers={"X-Request-Id": "x" * 500}).headers["x-request-id"] != "x" * 500

    def test_no_other_origin_is_allowed(self, server: Running) -> None:
        response = server.client.get("/v1/models", headers={"Origin": "http://elsewhere"})
        assert not [name for name in response.headers if name.startswith("access-control")]

    def test_an_origin_that_was_named_is_allowed(self, tiny_bundle: Path) -> None:
        """Also where a key is needed: a browser asks first, without one, and reads refusals."""
        page, served = "https://page.example", scripted(tiny_bundle, slots_saying(tiny_bundle, [70], 1))
        with running(served, api_keys=(b"right",), cors_origins=[page]) as server:
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            for origin in (page, "https://other.example"):
                before = server.client.options("/v1/completions", headers={"Origin": origin, **asked})
                refused = server.client.post("/v1/completions", json={"prompt": [7]}, headers={"Origin": origin})
                assert refused.status_code == 401
                for response in (before, refused):
                    allowed = response.headers.get("access-control-allow-origin")
                    assert allowed == (page if origin == page else None)
                    assert response.headers["x-request-id"]
                assert (before.status_code == 200) == (origin == page)
            headers = {"Origin": page, "Authorization": "Bearer right"}
            chunks = server.client.post("/v1/completions", json={"prompt": [7], "stream": True}, headers=headers)
            assert chunks.headers["access-control-allow-origin"] == page and "[DONE]" in chunks.text

    @pytest.mark.parametrize(
        "path",
        ["../start.py", "%2e%2e/start.py", "%2e%2e%2fstart.py", "..%5cstart.py", "%2e%2e", "index.html", "/etc/passwd"],
    )
    def test_no_path_comes_from_a_client(self, server: Running, path: str) -> None:
        """As it is written: httpx takes dots out of a path before it sends it."""
        with contextlib.closing(HTTPConnection(*server.address, timeout=60)) as connection:
            connection.request("GET", f"/page/{path}")
            answer = connection.getresponse()
            assert answer.status == 404 and b'"error"' in answer.read()
            connection.request("GET", "/page/page.css")
            assert connection.getresponse().status == 200

    @pytest.mark.parametrize("configured", [False, True], ids=["as it is", "after serve set up its log"])
    def test_prompts_are_not_logged(self, server: Running, caplog: pytest.LogCaptureFixture, configured: bool) -> None:
        """`serve` keeps its log from the root, where it is read here."""
        if configured:
            configure("text")
        for name in ("doge_deploy.serve", "uvicorn", "asyncio"):
            logging.getLogger(name).propagate = True
            caplog.set_level("DEBUG", name)
        with caplog.at_level("DEBUG"):
            body = {"prompt": "my secret prompt", "max_tokens": 1}
            response = server.client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
            assert response.status_code == 200 and server.logged(caplog, "mine")["status"] == 200
        assert "secret" not in caplog.text and "secret" not in str([vars(record) for record in caplog.records])


class TestMetrics:
    """16: names as dashboards know them."""

    NAMES = """num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens_total generation_tokens_total
        request_success_total time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
        e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket prefix_cache_hits_total
        prefix_cache_queries_total spec_accepted_tokens_total""".split()

    def test_every_name_is_there_and_counts(self, server: Running) -> None:
        def value(name: str, label: str = "") -> float:
            lines = server.client.get("/metrics").text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith(f"doge_{name}{{") and label in line)

        before = value("generation_tokens_total"), value("request_success_total", 'finished_reason="length"')
        server.complete("a", max_tokens=7, temperature=0, logit_bias={"1": -100})
        assert value("generation_tokens_total") == before[0] + 7
        assert value("request_success_total", 'finished_reason="length"') == before[1] + 1
        text = server.client.get("/metrics").text
        for name in self.NAMES:
            assert f"\ndoge_{name}{{" in text, name

    def test_every_reason_is_there_before_its_first_request(self, tiny_bundle: Path) -> None:
        """Else an alarm does not see the first one: what comes into being has not grown."""
        metrics = scripted(tiny_bundle, ScriptedSlots(1)).metrics
        labels = {"model_name": NAME}
        for reason in ("stop", "length", "cancelled", "error"):
            assert (
                metrics.registry.get_sample_value("doge_request_success_total", {**labels, "finished_reason": reason})
                == 0
            ), reason

    def test_times_are_counted_as_the_library_counts_them(self) -> None:
        times, reference = Metrics(), CollectorRegistry()
        theirs = Histogram("doge_e2e_request_latency_seconds", "x", ["model_name"], registry=reference, buckets=SECONDS)
        mine = times.of("a").latency
        for seconds in (0.0, 0.001, 0.0011, 0.05, 0.3, 60.0, 61.0, *(0.7**k for k in range(40))):
            mine.observe(seconds)
            theirs.labels("a").observe(seconds)
        lines, expected = (
            [line for line in generate_latest(one).decode().splitlines() if line.startswith("doge_e2e")]
            for one in (times.registry, reference)
        )
        assert lines == [line for line in expected if "_created" not in line] and len(lines) == len(SECONDS) + 3


class TestShapes:
    """What `/openapi.json` says of answers is what they are."""

    def test_each_answer_is_as_documented(self, server: Running) -> None:
        paths = server.client.get("/openapi.json").json()["paths"]
        documented = {
            path: "application/json" in post["post"]["responses"]["200"]["content"]
            for path, post in paths.items()
            if "post" in post
        }
        assert documented and all(documented.values())
        for options in ({}, {"logprobs": True, "top_logprobs": 2}):
            answer = server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=3, **options)
            schemas.ChatCompletion.model_validate(answer)
        for options in ({}, {"logprobs": 2, "echo": False}):
            schemas.Completion.model_validate(server.complete("a", max_tokens=3, **options))
        schemas.ErrorAnswer.model_validate(server.post("/v1/completions", 400, prompt=5))
        schemas.Tokens.model_validate(server.post("/tokenize", prompt="a"))
        schemas.ModelList.model_validate(server.client.get("/v1/models").json())


class TestModels:
    def test_models(self, server: Running) -> None:
        (card,) = server.client.get("/v1/models").json()["data"]
        assert card["id"] == NAME and card["max_model_len"] == 512
        assert card["doge_deploy"]["verified"] is None
        server.served.verified = {NAME: {"verdict": "computes the same"}, "other": {}}
        (judged,) = server.client.get("/v1/models").json()["data"]
        server.served.verified = {}
        assert judged["doge_deploy"]["verified"] == {"verdict": "computes the same"}
        assert server.client.get(f"/v1/models/{NAME}").json() == card
        assert server.client.get("/v1/models/other").status_code == 404

    def test_ready(self, server: Running) -> None:
        assert server.client.get("/ready").json() == {"status": "ready"}
        server.served.draining = True
        try:
            assert server.client.get("/ready").status_code == 503
            assert server.post("/v1/completions", 503, prompt="a")["error"]["code"] == "shutting_down"
        finally:
            server.served.draining = False

    def test_a_failed_engine_is_not_ready_and_nobody_hangs(self, tiny_bundle: Path) -> None:
        served = scripted(tiny_bundle, slots_saying(tiny_bundle, [70], 1, seconds=0.05))
        with running(served) as server, ThreadPoolExecutor() as pool:
            job = pool.submit(server.client.post, "/v1/completions", json={"prompt": [7], "max_tokens": 400})
            server.wait_until(lambda: server.scheduler.running == 1)
            server.scheduler._admit = lambda: 1 / 0
            assert job.result().status_code == 500 and "ZeroDivisionError" in job.result().text
            assert server.client.get("/ready").status_code == 503
            assert server.post("/v1/completions", 503, prompt=[7])["error"]["message"]


class TestGuided:
    """What the answer must look like is what it looks like."""

    @pytest.mark.parametrize("seed", range(3))
    def test_each_kind(self, server: Running, seed: int) -> None:
        base = {"prompt": "x", "max_tokens": 120, "temperature": 1.0, "seed": seed, "top_k": 0}
        choice = server.post("/v1/completions", **base, guided_choice=["yes", "no", "maybe so"])["choices"][0]
        assert choice["text"] in ("yes", "no", "maybe so") and choice["finish_reason"] == "stop"
        digits = server.post("/v1/completions", **base, guided_regex="[0-9]{3}-[ab]")["choices"][0]["text"]
        assert digits[:3].isdigit() and digits[3:] in ("-a", "-b")
        grammar = 'start: "(" /[a-c]+/ ")"'
        found = server.post("/v1/completions", **base, guided_grammar=grammar)["choices"][0]
        assert found["finish_reason"] == "length" or (found["text"][0], found["text"][-1]) == ("(", ")")
        schema = {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
            "required": ["ok", "n"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        found = server.post("/v1/completions", **base, response_format=form)["choices"][0]
        if found["finish_reason"] == "stop":
            data = json.loads(found["text"])
            assert isinstance(data["ok"], bool) and data["n"] in (1, 2)

    @pytest.mark.parametrize("seed", range(4))
    def test_json_is_on_one_line(self, server: Running, seed: int) -> None:
        """Where blanks are free, a small model writes blanks until its text is full."""
        schema = {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "b": {"type": "array", "items": {"enum": [1]}, "maxItems": 2}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        options = {"messages": MESSAGES, "max_tokens": 60, "temperature": 1.0, "top_k": 0, "seed": seed}
        found = server.post("/v1/chat/completions", **options, response_format=form)["choices"][0]
        text = found["message"]["content"]
        assert found["finish_reason"] == "stop" and text == json.dumps(json.loads(text))


def test_threads_end_with_the_server(tiny_bundle: Path) -> None:
    before = threading.active_count()
    with running(scripted(tiny_bundle, slots_saying(tiny_bundle, [70], 1))) as server:
        server.complete([7], max_tokens=2)
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
