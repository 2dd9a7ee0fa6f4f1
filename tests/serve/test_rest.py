"""Memory is given back once after the last request, whatever became of it, and never while something is computed."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import NAME, Running, SlowSlots, running, scripted

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.serve.http import rest
from doge_deploy.serve.scheduler import Limits

Given = queue.SimpleQueue[bool]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    """Gets an entry each time that memory is given back."""
    found: Given = queue.SimpleQueue()
    monkeypatch.setattr(rest, "REST_SECONDS", 0.05)
    monkeypatch.setattr(rest, "give_back", lambda: found.put(True))
    return found


@pytest.fixture
def slots(tiny_bundle: Path) -> SlowSlots:
    vocab = open_bundle(tiny_bundle).manifest.facts.vocab_size
    return SlowSlots(2, vocab=vocab, max_length=512, rule=lambda history: 70, seconds=0.001)


@pytest.fixture
def server(tiny_bundle: Path, given: Given, slots: SlowSlots) -> Iterator[Running]:
    with running(scripted(tiny_bundle, slots, Limits(queue_requests=4))) as found:
        yield found


def is_silent(given: Given) -> bool:
    try:
        given.get(timeout=0.25)
    except queue.Empty:
        return True
    return False


LONG = "ab " * 50_000


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/v1/completions", 200, {"prompt": [7], "max_tokens": 20}),
        ("/v1/completions", 200, {"prompt": [7], "max_tokens": 20, "stream": True}),
        ("/v1/chat/completions", 400, {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/completions", 400, {"prompt": LONG, "top_p": 2}),
        ("/tokenize", 200, {"prompt": LONG}),
        ("/nothing", 404, {"prompt": LONG}),
    ],
    ids=["made", "streamed", "too long", "illegal", "tokenized", "unknown"],
)
def test_once_after_each_request(
    server: Running, given: Given, path: str, status: int, body: dict[str, object]
) -> None:
    assert is_silent(given), "nothing was asked for yet"
    for _ in range(2):
        assert server.client.post(path, json=body).status_code == status
        assert given.get(timeout=60)
        assert is_silent(given)


def test_looking_at_the_server_is_no_request(server: Running, given: Given) -> None:
    for path in ("/metrics", "/health", "/v1/models", "/"):
        assert server.client.get(path).status_code == 200
    assert is_silent(given)


def test_not_before_the_last_of_several(server: Running, given: Given, slots: SlowSlots) -> None:
    slots.hold()
    with ThreadPoolExecutor() as pool:
        one = pool.submit(server.complete, [7], max_tokens=20)
        server.wait_until(lambda: server.served.working == 1)
        for _ in range(3):
            server.post("/tokenize", prompt="a")
        assert is_silent(given) and not one.done()
        slots.go.set()
        assert one.result()["choices"]
    assert given.get(timeout=60) and is_silent(given)


def test_not_while_something_is_computed_that_nobody_waits_for(
    server: Running, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = server.served.texts[NAME].engine
    idle = False
    monkeypatch.setattr(type(engine.scheduler), "idle", property(lambda _: idle))
    server.post("/tokenize", prompt="a")
    assert is_silent(given)
    idle = True
    assert given.get(timeout=60) and is_silent(given)
