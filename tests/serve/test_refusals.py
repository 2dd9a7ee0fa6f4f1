"""What a client is told of a request that cannot be answered: which field, why, and what would be legal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_slots import ScriptedSlots
from servers import NAME, Running, SlowSlots, of_bundle, running, scripted

from doge_deploy.bundle.opening import open_bundle

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
SAID: list[dict[str, Any]] = [{"role": "user", "content": "a"}]


def refused(server: Running, path: str, **body: Any) -> Any:
    """The error of a body that may hold what is not Unicode text."""
    response = server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def slots(tiny_bundle: Path, **options: Any) -> ScriptedSlots:
    """Whose texts do not end by themselves."""
    vocab = open_bundle(tiny_bundle).manifest.facts.vocab_size
    return SlowSlots(2, rule=lambda history: 70, vocab=vocab, max_length=512, **options)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    """Quick slots."""
    with running(scripted(tiny_bundle, slots(tiny_bundle))) as found:
        yield found


@pytest.fixture(scope="module")
def features(features_bundle: Path) -> Iterator[Running]:
    """Embeddings alone."""
    with running(of_bundle(features_bundle)) as found:
        yield found


class TestMessagesAsClientsSendThem:
    @pytest.mark.parametrize(
        "more",
        [
            {"type": "text"},  # lm-evaluation-harness
            # what the model_dump() of a message has in OpenAI's client for Python
            {
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": None,
                "parsed": None,
            },
            {"annotations": [], "tool_calls": [], "refusal": None},
            # what other servers answer, and LiteLLM adds
            {"reasoning_content": None, "reasoning": None, "provider_specific_fields": None, "images": []},
            {"reasoning_content": "", "reasoning": "", "tool_call_id": None, "name": "ann"},
        ],
        ids=lambda more: ",".join(more),
    )
    def test_fields_without_effect_are_accepted(self, server: Running, more: dict[str, Any]) -> None:
        talk = [*SAID, {"role": "assistant", "content": "b", **more}, {"role": "user", "content": "c", **more}]
        assert server.post(CHAT, messages=talk, max_tokens=1)["choices"]
        assert server.post("/tokenize", messages=talk)["count"]

    @pytest.mark.parametrize(
        "more",
        [
            {"type": "image"},
            {"tool_calls": [{"id": "a"}]},
            {"reasoning_content": "it is"},
            {"tool_call_id": "call_1"},
            {"parsed": {"a": 1}},
            {"audio": {"id": "a"}},
            {"unheard_of": None},
        ],
        ids=lambda more: ",".join(more),
    )
    def test_what_would_have_an_effect_is_refused_by_name(self, server: Running, more: dict[str, Any]) -> None:
        error = server.post(CHAT, 400, messages=[{**SAID[0], **more}])["error"]
        assert error["param"] == f"messages.0.{next(iter(more))}" and "not supported" in error["message"]


LONG = [70] * 513


class TestTheFieldIsNamed:
    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [
            (TEXT, {"prompt": LONG}, "prompt"),
            (TEXT, {"prompt": [[70], LONG]}, "prompt.1"),
            (TEXT, {"prompt": [70, 99999]}, "prompt"),
            (TEXT, {"prompt": [99999], "echo": True}, "prompt"),
            (TEXT, {"prompt": [[70], [99999]]}, "prompt.1"),
            (TEXT, {"prompt": "a\ud800"}, "prompt"),
            (TEXT, {"prompt": ["b", "a\ud800"]}, "prompt.1"),
            (CHAT, {"messages": [{"role": "user", "content": "a b c d " * 400}]}, "messages"),
            (CHAT, {"messages": [{"role": "user", "content": "a\ud800"}]}, "messages"),
            (CHAT, {"messages": SAID, "logit_bias": {"99999": 1}}, "logit_bias"),
            (TEXT, {"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias"),
            (TEXT, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x"),
            (TEXT, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
            (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
            (TEXT, {"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
            (TEXT, {"prompt": "a", "guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
            (CHAT, {"messages": SAID, "top_logprobs": 2}, "top_logprobs"),
            (CHAT, {"messages": SAID, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
            (CHAT, {"messages": SAID, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
            (
                CHAT,
                {"messages": SAID, "response_format": {"type": "text", "json_schema": {"schema": {}}}},
                "response_format.json_schema",
            ),
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "messages": SAID}, "prompt"),
            ("/tokenize", {"prompt": "a\ud800"}, "prompt"),
            ("/detokenize", {"tokens": [99999]}, "tokens"),
        ],
    )
    def test_of_texts(self, server: Running, path: str, body: dict[str, Any], param: str) -> None:
        error = refused(server, path, **body)
        assert error["param"] == param and error["message"].startswith(f"{param}: "), error

    @pytest.mark.parametrize(
        ("value", "param"),
        [(LONG, "input"), ("a b c d " * 400, "input"), ([[70], [99999]], "input.1"), ("a\ud800", "input")],
    )
    def test_of_embeddings(self, features: Running, value: Any, param: str) -> None:
        error = refused(features, "/v1/embeddings", input=value)
        assert error["param"] == param and error["message"].startswith(f"{param}: "), error

    def test_a_rule_between_fields_is_said_once(self, server: Running) -> None:
        error = server.post(TEXT, 400, prompt="a", stream_options={})["error"]
        assert error["message"] == "stream_options: only with stream: true"


class TestTooLong:
    def test_clients_know_the_code_and_both_numbers_are_said(self, server: Running, features: Running) -> None:
        texts = server.post(TEXT, 400, prompt=LONG)["error"]
        vectors = features.post("/v1/embeddings", 400, input=LONG)["error"]
        assert texts["code"] == vectors["code"] == "context_length_exceeded"
        assert texts["message"] == "prompt: 513 tokens; this model's maximum context length is 512 tokens"
        assert vectors["message"] == texts["message"].replace("prompt", "input", 1)

    def test_a_prompt_of_all_tokens_has_one_more(self, server: Running) -> None:
        assert server.complete(LONG[:-1])["usage"]["total_tokens"] == 513

    def test_an_answer_has_what_the_bundle_says_where_nobody_says(self, server: Running) -> None:
        assert server.complete([70])["usage"]["completion_tokens"] == 100
        assert server.post(CHAT, messages=SAID)["usage"]["completion_tokens"] == 100


class TestWords:
    """In the words of JSON and of this server, not in those of a library."""

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"prompt": None}, "prompt: must be a text, a list of texts, or token ids; not null"),
            ({"prompt": {}}, "prompt: must be a text, a list of texts, or token ids; not an object"),
            ({"prompt": []}, "prompt: must not be empty"),
            ({"prompt": [[]]}, "prompt.0: must not be empty"),
            ({"prompt": [-1]}, "prompt.0: must be at least 0; not -1"),
            ({}, "prompt: must be given"),
            ({"store": True}, "store: not supported by this server; null or false is accepted"),
            (
                {"service_tier": "x"},
                'service_tier: not supported by this server; null, "auto" or "default" is accepted',
            ),
            ({"top_p": 2}, "top_p: must be at most 1; not 2"),
            ({"top_p": "2"}, 'top_p: must be a number; not "2"'),
            ({"n": 1.5}, "n: must be a whole number; not 1.5"),
            ({"n": "x" * 100}, "n: must be a whole number; not a text"),
            ({"n": 0}, "n: must be at least 1; not 0"),
            ({"stream": 1}, "stream: must be true or false; not 1"),
            ({"stop": 5}, "stop: must be a text or a list of texts; not 5"),
            ({"stop": [""]}, "stop.0: must not be empty"),
            ({"stop": ["a", 5]}, "stop.1: must be a text; not 5"),
            ({"stop": ["a" * 257]}, "stop.0: must have at most 256 characters"),
            ({"logit_bias": {"x": 1}}, "logit_bias.x: must be a token id, in digits"),
            ({"logit_bias": [5]}, "logit_bias: must be a JSON object; not a list"),
            ({"stream_options": 1}, "stream_options: must be a JSON object; not 1"),
            ({"response_format": {"type": "xml"}}, None),
            ({"guided_choice": []}, "guided_choice: must not be empty"),
            ({"user": 5}, "user: must be a text; not 5"),
            ({"echo": None, "suffix": "a"}, 'suffix: not supported by this server; null or "" is accepted'),
        ],
    )
    def test_of_a_text(self, server: Running, body: dict[str, Any], message: str | None) -> None:
        given = body if not body or "prompt" in body else {"prompt": "a", **body}
        message = message or ("response_format.type: must be 'text', 'json_object' or 'json_schema'; not \"xml\"")
        assert server.post(TEXT, 400, **given)["error"]["message"] == message

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "messages: must not be empty"),
            ("a", 'messages: must be a list; not "a"'),
            (["a"], 'messages.0: must be a JSON object; not "a"'),
            ([{"role": "user"}], "messages.0.content: must be given"),
            ([{"role": "user", "content": None}], "messages.0.content: must be a text or a list of parts; not null"),
            (
                [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
                "messages.0.content.0.type: must be 'text'; not \"image_url\"",
            ),
            ([{"role": "user", "content": ["a"]}], 'messages.0.content.0: must be a JSON object; not "a"'),
        ],
    )
    def test_of_a_conversation(self, server: Running, messages: Any, message: str) -> None:
        assert server.post(CHAT, 400, messages=messages)["error"]["message"] == message

    def test_no_sentence_of_the_library_is_left(self, server: Running) -> None:
        """Whatever a field gets that it does not take."""
        schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
        seen = 0
        for path, name in ((TEXT, "CompletionBody"), (CHAT, "ChatBody"), ("/tokenize", "TokenizeBody")):
            needed: dict[str, Any] = {CHAT: {"messages": SAID}}.get(path, {"prompt": "a"})
            for field in schemas[name]["properties"]:
                for value in (None, True, -1, 1e9, 2**70, "", "x" * 300, [], [[]], [{}], {}, {"x": "y"}, [None] * 5000):
                    response = server.client.post(path, json={**needed, "model": None, field: value})
                    if response.status_code == 400:
                        seen += 1
                        message = response.json()["error"]["message"]
                        assert not re.search(r"nput should|should have|Field required|valid |None|True|False", message)
        assert seen > 200


def test_embeddings_of_a_server_that_makes_none(server: Running, features: Running) -> None:
    error = server.post("/v1/embeddings", 404, input="a")["error"]
    assert error["message"] == (
        "model: nothing here makes embeddings; serve a bundle that was exported with --task features"
    )
    assert server.post("/v1/embeddings", 404, input="a", model="x")["error"]["message"] == error["message"]
    error = features.post(TEXT, 404, prompt="a")["error"]
    assert error["message"] == (
        "model: nothing here makes text; serve a bundle that was exported with --task causal-lm"
    )
    assert error["param"] == "model" and error["code"] == "model_not_found"


class TestTools:
    """The server calls none, and many clients send some unless they are told not to."""

    TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
    TOLD = (
        "tools: this server calls no tools; leave tools and tool_choice out, or send tool_choice 'none'; "
        "for an answer of a given form use response_format"
    )

    @pytest.mark.parametrize(
        "more",
        [
            {"tools": TOOLS},
            {"tools": TOOLS, "tool_choice": None},
            {"tools": TOOLS, "tool_choice": "auto"},
            {"tools": TOOLS, "tool_choice": "required"},
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            {"tool_choice": "required"},
        ],
    )
    def test_who_wants_tools_is_told_what_to_do(self, server: Running, more: dict[str, Any]) -> None:
        error = server.post(CHAT, 400, messages=SAID, **more)["error"]
        assert error["message"] == self.TOLD and error["param"] == "tools"

    def test_tools_that_must_not_be_called_have_no_effect(self, server: Running) -> None:
        options = {"messages": SAID, "max_tokens": 2, "temperature": 0}
        plain = server.post(CHAT, **options)
        offered = server.post(CHAT, **options, tools=self.TOOLS, tool_choice="none")
        assert offered["choices"] == plain["choices"]
        assert offered["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]

    def test_tools_that_nobody_looks_at_are_not_held_without_a_limit(self, server: Running) -> None:
        many = [{"type": "function", "function": {"name": "f", "parameters": {"enum": [0] * 8192}}}]
        error = server.post(CHAT, 400, messages=SAID, tools=many, tool_choice="none")["error"]
        assert error["param"] == "tools" and "more than 8192 values" in error["message"]
        part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "more": [0]}}
        error = server.post(CHAT, 400, messages=[{"role": "user", "content": [part]}])["error"]
        assert error["param"].endswith("cache_control.more")

    def test_a_call_in_a_conversation_is_what_is_named(self, server: Running) -> None:
        """Such a message has no content: null."""
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        messages = [*SAID, {"role": "assistant", "content": None, "tool_calls": [call]}]
        error = server.post(CHAT, 400, messages=messages)["error"]
        assert error["param"] == "messages.1.tool_calls"


class TestSmallThingsOfClients:
    @pytest.mark.parametrize(
        "more",
        [
            {"reasoning_effort": "none"},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}
                ]
            },
        ],
    )
    def test_what_asks_for_nothing_is_accepted(self, server: Running, more: dict[str, Any]) -> None:
        assert server.post(CHAT, **{"messages": SAID, "max_tokens": 1, **more})["choices"]

    def test_dimensions_may_be_those_that_there_are(self, features: Running) -> None:
        (row,) = features.post("/v1/embeddings", input="a", dimensions=128)["data"]
        assert len(row["embedding"]) == 128
        error = features.post("/v1/embeddings", 400, input="a", dimensions=64)["error"]
        assert error["message"] == "dimensions: must be 128, which this model's vectors have; not 64"
        assert error["param"] == "dimensions"

    def test_both_names_of_a_length_are_those_of_a_completion_too(self, server: Running) -> None:
        """GuideLLM 0.2 sends both."""
        options = {"prompt": "a", "temperature": 0, "ignore_eos": True}
        for lengths in ({"max_tokens": 3, "max_completion_tokens": 3}, {"max_completion_tokens": 3}):
            assert server.complete(**options, **lengths)["usage"]["completion_tokens"] == 3
        error = server.post(TEXT, 400, **options, max_tokens=3, max_completion_tokens=4)["error"]
        assert error["message"] == "max_tokens: max_completion_tokens says another number; give one of them"

    @pytest.mark.parametrize(
        ("path", "meant"),
        [
            ("/chat/completions", CHAT),
            ("/completions", TEXT),
            ("/embeddings", "/v1/embeddings"),
            ("/models", "/v1/models"),
            ("/v1/v1/chat/completions", CHAT),  # of clients that add /v1 by themselves
            ("/v1/chat/completions/chat/completions", CHAT),  # where somebody gave them the whole address
            ("/v1//completions", TEXT),
            ("/api/v1/models", "/v1/models"),
        ],
    )
    def test_a_wrong_base_url_is_told(self, server: Running, path: str, meant: str) -> None:
        response = server.client.get(path) if path.endswith("/models") else server.client.post(path, json={})
        assert response.status_code == 404
        said = f"there is no {path}; it is {meant} here: the client's base_url must be http://HOST:PORT/v1"
        assert response.json()["error"]["message"] == said

    @pytest.mark.parametrize("path", ["/v1/responses", "/responses", "/v1/responses/resp_1"])
    def test_who_asks_for_responses_is_told_what_there_is(self, server: Running, path: str) -> None:
        """What LangChain, pydantic-ai and the AI SDK may ask first."""
        response = server.client.post(path, json={"model": "doge-tiny", "input": "a"})
        assert response.status_code == 404
        assert response.json()["error"]["message"] == (
            f"there is no {path}: OpenAI's Responses API is not part of this server; "
            "tell the client to use chat completions"
        )

    @pytest.mark.parametrize("path", ["/api/tags", "/v1", "/v1/messages", "/docs", "/nothing", "/a%20b%3F%0A"])
    def test_another_path_is_told_where_all_paths_are(self, server: Running, path: str) -> None:
        response = server.client.get(path)
        assert response.status_code == 404
        message = f"there is no {path}; /openapi.json lists the paths"
        assert response.json()["error"]["message"] == message

    @pytest.mark.parametrize(
        ("method", "path", "legal"), [("GET", CHAT, "POST"), ("PUT", TEXT, "POST"), ("POST", "/v1/models", "GET, HEAD")]
    )
    def test_another_method_is_told_which_one_it_is(self, server: Running, method: str, path: str, legal: str) -> None:
        response = server.client.request(method, path)
        assert response.status_code == 405 and response.headers["Allow"] == legal
        assert response.json()["error"]["message"] == f"{path} takes {legal}; not {method}"

    def test_an_unknown_model_of_the_list_is_told_those_that_there_are(self, server: Running) -> None:
        error = server.client.get("/v1/models/gpt-4").json()["error"]
        assert error["message"] == f"model: no model 'gpt-4' here; there is: {NAME}"

    @pytest.mark.parametrize("keys", [(), (b"key",)])
    def test_the_schema_names_the_key_where_one_is_needed(self, tiny_bundle: Path, keys: tuple[bytes, ...]) -> None:
        with running(scripted(tiny_bundle, slots(tiny_bundle)), api_keys=keys) as server:
            document = server.client.get("/openapi.json").json()
            needed = {
                path: bool(one.get("security", document.get("security")))
                for path, methods in document["paths"].items()
                for one in methods.values()
            }
            for path in ("/health", "/ready", "/metrics", "/v1/models"):
                assert needed[path] == (server.client.get(path).status_code == 401)
            assert needed[TEXT] == bool(keys)
            schemes = document["components"].get("securitySchemes", {})
            assert schemes == ({"key": {"type": "http", "scheme": "bearer"}} if keys else {})

    @pytest.mark.parametrize("costs", [None, {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}], ids=["", "guesses"])
    def test_a_token_that_ends_texts_may_be_one_like_others(self, tiny_bundle: Path, costs: Any) -> None:
        """vLLM's ignore_eos, also in the middle of guessed tokens; a stop text ends the text all the same."""
        bundle = open_bundle(tiny_bundle)
        facts = bundle.manifest.facts
        (eos, *_) = facts.eos_token_ids
        rule = lambda past: eos if len(past) % 5 == 0 else 70 + len(past) % 5  # noqa: E731
        found = SlowSlots(1, rule=rule, vocab=facts.vocab_size, max_length=512)
        found.all_logits = True
        with running(scripted(tiny_bundle, found, costs=costs)) as server:
            options = {"prompt": [7], "max_tokens": 60, "temperature": 0}
            ended = server.complete(**options, ignore_eos=False)
            assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == 5
            long = server.complete(**options, ignore_eos=True)
            assert long["choices"][0]["finish_reason"] == "length" and long["usage"]["completion_tokens"] == 60
            assert bool(server.scheduler.counters.draft_tokens) == (costs is not None)
            text = long["choices"][0]["text"]
            stop = text[: len(text) // 2][-4:]
            cut = server.complete(**options, ignore_eos=True, stop=stop)["choices"][0]
            assert cut["finish_reason"] == "stop" and cut["text"] == text[: text.index(stop)]

    def test_what_has_a_form_ends(self, server: Running) -> None:
        error = server.post(TEXT, 400, prompt="a", ignore_eos=True, guided_regex="a")["error"]
        assert (
            error["message"]
            == "ignore_eos: a text whose form is given ends with it; leave out ignore_eos or guided_regex"
        )


def test_a_fault_of_our_own_is_an_error_object_with_an_id_and_a_log_entry(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    caplog.set_level("INFO", "doge_deploy.serve")
    monkeypatch.setattr(type(server.served.text(None)), "encode", broken)
    response = server.client.post(TEXT, json={"prompt": "a"}, headers={"X-Request-Id": "mine"})
    assert response.status_code == 500 and response.headers["x-request-id"] == "mine"
    said = {"message": "internal error: RuntimeError", "type": "server_error", "param": None, "code": None}
    assert response.json() == {"error": said}
    (record,) = [record for record in caplog.records if record.getMessage() == "request failed"]
    assert record.exc_info is not None and str(record.exc_info[1]) == "a secret"
    assert server.logged(caplog, "mine")["status"] == 500
