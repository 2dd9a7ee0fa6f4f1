"""A server in this process, on a real port: with a bundle's own engine, or with slots that are scripted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from scripted_slots import ScriptedSlots

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.serve.engine import Engine
from doge_deploy.serve.http.app import Served, create_app
from doge_deploy.serve.http.connections import Patience, patient
from doge_deploy.serve.http.inbox import Inbox
from doge_deploy.serve.http.metrics import Metrics
from doge_deploy.serve.model import ServedText
from doge_deploy.serve.scheduler import Limits, Scheduler
from doge_deploy.serve.start import ServeOptions, open_served

NAME = "doge"

EOS = 1
"""Of the bundles of tests."""


class SlowSlots(ScriptedSlots):
    """Takes its time, so that a test can do something meanwhile; a draw gives the likeliest token too."""

    peak = 60.0

    def __init__(self, *arguments: Any, seconds: float = 0.0, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.seconds = seconds
        self.go, self.over = threading.Event(), threading.Event()
        self.go.set()
        scripted_rule = self.rule
        self.rule = lambda history: EOS if self.over.is_set() else scripted_rule(history)

    def hold(self) -> None:
        """No call of the engine ends before `go` is set: what a request is in lasts until then."""
        self.go.clear()

    def _feed(self, slot: int, ids: Sequence[int]) -> Any:
        """From the moment when `over` is set every text ends with its next token."""
        assert self.go.wait(600)  # longer than anything waits for what must come without it
        time.sleep(self.seconds)
        return super()._feed(slot, ids)


@dataclass
class Running:
    """A server that runs, and what is inside it."""

    url: str
    served: Served
    client: httpx.Client
    connections: Collection[Any]
    """Those that are open, of uvicorn."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def scheduler(self) -> Scheduler:
        return next(iter(self.served.texts.values())).engine._scheduler

    def at_rest(self) -> bool:
        """Whether nothing is being answered or computed, by the engines' own threads: another one sees a request that
        goes from one list to the next in neither.
        """
        engines = [model.engine for model in self.served.texts.values()]
        return not self.served.working and all(engine.ask(lambda one: one.idle).result(60) for engine in engines)

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """The server's event loop stands still within the block: what is sent meanwhile it finds all at once."""
        (inbox,) = self.served.inboxes.values()
        assert inbox._loop is not None
        stands, go = threading.Event(), threading.Event()

        def stand() -> None:
            stands.set()
            go.wait(600)

        inbox._loop.call_soon_threadsafe(stand)
        assert stands.wait(60)
        try:
            yield
        finally:
            go.set()

    def post(self, path: str, status: int = 200, **body: Any) -> Any:
        response = self.client.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()

    def complete(self, prompt: Any, **options: Any) -> Any:
        return self.post("/v1/completions", prompt=prompt, **options)

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, which must end with [DONE]."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = [line for line in response.iter_lines() if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.005)

    def logged(self, caplog: pytest.LogCaptureFixture, request_id: str) -> dict[str, Any]:
        """The log's line of one request: it is written behind the answer, perhaps after the next test has begun."""

        def lines() -> list[dict[str, Any]]:
            found = [record.fields for record in caplog.records if record.getMessage() == "request"]
            return [fields for fields in found if fields.get("request_id") == request_id]

        self.wait_until(lambda: bool(lines()))
        (line,) = lines()
        return line


def scripted(bundle_path: Path, slots: ScriptedSlots, limits: Limits | None = None, costs: Any = None) -> Served:
    """The bundle's tokenizer and options over slots that are scripted."""
    bundle = open_bundle(bundle_path)
    metrics = Metrics()
    inbox = Inbox(NAME, metrics)
    scheduler = Scheduler(slots, limits, costs)
    metrics.watch(NAME, scheduler)
    model = ServedText(NAME, bundle, Engine(scheduler, inbox.deliver), all_logits=slots.all_logits)
    return Served({NAME: model}, {}, metrics, {NAME: inbox})


def of_bundle(*paths: Path, **options: Any) -> Served:
    """Bundles as `doge-deploy serve` opens them; a grammar may take as long as a busy machine needs for it."""
    served = open_served(paths, ServeOptions(threads=1, **options))
    for model in served.texts.values():
        model.grammars._trial._seconds = 60.0
    return served


@contextlib.contextmanager
def running(served: Served, *, patience: Patience | None = None, **options: Any) -> Iterator[Running]:
    """Serve on a free port until the block ends."""
    config = uvicorn.Config(
        create_app(served, **options),
        port=0,
        http=patient(patience or Patience()),
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_keep_alive=600,  # no connection is closed at the moment when a client uses it again
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.005)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    # with fewer idle connections than threads, httpx closes connections that another thread has just begun to use
    limits = httpx.Limits(max_keepalive_connections=100)
    with httpx.Client(base_url=url, timeout=60, limits=limits) as client:
        try:
            yield Running(url, served, client, server.server_state.connections)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
