"""What schemathesis runs beside its own checks; loaded by it, in its environment.

Legal bodies are made to fit together, where the schema cannot say what fits: of random texts hardly one is a regular
expression that can be followed. Illegal bodies stay as they are. Every answer is counted, by operation, mode and
status, into the file that the variable DOGE_FUZZ_COUNTS names.
"""

from __future__ import annotations

import atexit
import collections
import json
import os
import zlib
from pathlib import Path
from typing import Any

import schemathesis

VOCAB = 1024
GUIDED = {
    "guided_regex": "[0-9]{2}",
    "guided_choice": ["yes", "no"],
    "guided_grammar": 'start: "a" | "b"',
    "guided_json": {"type": "boolean"},
    "structured_outputs": {"regex": "[a-f]{2}"},
}

_counts: collections.Counter[str] = collections.Counter()


def _fit(path: str, body: dict[str, Any]) -> None:
    """Change a legal body in place so that its parts agree; one in eight stays as it was drawn."""
    chance = zlib.crc32(json.dumps(body, sort_keys=True, default=str).encode())
    if chance % 8 == 0:
        return
    if "model" in body or path == "/v1/embeddings":
        body["model"] = "features" if path == "/v1/embeddings" else "text"
    for name in ("prompt", "input"):
        if isinstance(body.get(name), list):
            body[name] = [_known(item) for item in body[name]]
    if path == "/tokenize" and (body.get("prompt") is None) == (body.get("messages") is None):
        body["prompt"] = "a text"
        body.pop("messages", None)
    if "messages" in body:
        for number, message in enumerate(body["messages"] or []):
            message["role"] = "assistant" if number % 2 else "user"
    if path in ("/v1/completions", "/v1/chat/completions"):
        _fit_generation(body, chance // 8)


def _known(item: Any) -> Any:
    """Token ids that the model has."""
    return (
        [one % VOCAB for one in item[:200]] if isinstance(item, list) else item % VOCAB if type(item) is int else item
    )


def _fit_generation(body: dict[str, Any], chance: int) -> None:
    body["model"] = "text"
    lengths = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    for name in lengths[1:]:
        del body[name]
    for name in lengths[:1]:
        body[name] = max(body[name] % 16, 0 if body.get("echo") and "prompt" in body else 1)
    if "messages" in body and not lengths:
        body["max_tokens"] = 8
    if "n" in body:
        body["n"] = None if body["n"] is None else 1 + body["n"] % 3
    if body.get("stream") is not True:
        body.pop("stream_options", None)
    if body.get("tools"):
        body["tool_choice"] = "none"
    if body.get("top_logprobs") is not None and "messages" in body:
        body["logprobs"] = True
    if body.get("logit_bias"):
        body["logit_bias"] = {str(int(token) % VOCAB): bias for token, bias in body["logit_bias"].items()}
    kept = sorted(GUIDED)[chance % 8] if chance % 8 < len(GUIDED) else None
    for name, legal in GUIDED.items():
        if body.get(name) is not None:
            body[name] = legal if name == kept else None
    if body.get("response_format") is not None:
        body["response_format"] = {"type": "text"} if kept is not None else {"type": "json_object"}


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Called with each case before it is sent."""
    if case.meta is not None and case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        _fit(case.operation.path, case.body)
    return case


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Count the answer."""
    mode = case.meta.generation.mode.value if case.meta is not None else "none"
    _counts[f"{case.method} {case.operation.path} {mode} {response.status_code}"] += 1


@schemathesis.check
def answers_have_an_id_and_errors_one_line(context: Any, response: Any, case: Any) -> None:
    """What holds for every answer."""
    assert response.headers.get("x-request-id"), "no X-Request-Id"
    if response.status_code >= 400 and response.request.method != "HEAD":
        message = response.json()["error"]["message"] if case.operation.path != "/ready" else "ready"
        assert message and "\n" not in message, f"not one line: {message!r}"


@schemathesis.check
def a_stream_is_whole(context: Any, response: Any, case: Any) -> None:
    """Events of JSON, the last one [DONE]; why each text ended is said once."""
    kind = response.headers.get("content-type", [""])[0]
    if not kind.startswith("text/event-stream"):
        return
    lines = [line for line in response.content.decode().split("\n\n") if line]
    assert lines and lines[-1] == "data: [DONE]", f"ends with {lines[-1:]}"
    ended: collections.Counter[int] = collections.Counter()
    for line in lines[:-1]:
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event, f"an error within: {event}"
        for choice in event["choices"]:
            ended[choice["index"]] += choice["finish_reason"] is not None
    assert ended and set(ended.values()) == {1}, f"ends: {ended}"


@atexit.register
def _write() -> None:
    if (file := os.environ.get("DOGE_FUZZ_COUNTS")) and _counts:
        Path(file).write_text(json.dumps(_counts), encoding="utf-8")
