"""Embeddings over HTTP: what they are, and that they hold nobody up."""

from __future__ import annotations

import base64
import math
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from servers import Running, of_bundle, running
from test_serve_command import serving

from doge_deploy.serve.scheduler import Limits


class Gated:
    """A runner that computes nothing before it is let go, and counts."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.go, self.calls = runner, threading.Event(), 0

    def reset(self, rows: int) -> None:
        self.runner.reset(rows)

    def run(self, ids: Any) -> Any:
        self.calls += 1
        assert self.go.wait(600)  # longer than anything waits for what must come without it
        return self.runner.run(ids)


@pytest.fixture
def gated(features_bundle: Path, tiny_bundle_last: Path) -> Iterator[tuple[Running, Gated]]:
    """A server of texts and of embeddings, two of which may wait; the latter do not begin before they are let go."""
    served = of_bundle(features_bundle, tiny_bundle_last, names=("features", "text"), limits=Limits(queue_requests=2))
    gate = Gated(served.features["features"]._runner)
    served.features["features"]._runner = gate  # type: ignore[assignment]
    with running(served) as server:
        try:
            yield server, gate
        finally:
            gate.go.set()


def test_embeddings(features_bundle: Path) -> None:
    with running(of_bundle(features_bundle, names=("features",))) as server:
        answer = server.post("/v1/embeddings", input=["a cat", "a dog", "x = 1"])
        vectors = [row["embedding"] for row in answer["data"]]
        assert all(math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-5) for vector in vectors)
        again = server.post("/v1/embeddings", input="a cat", encoding_format="base64")
        read = np.frombuffer(base64.b64decode(again["data"][0]["embedding"]), "<f4")
        np.testing.assert_array_equal(read, np.array(vectors[0], np.float32))
        assert server.post("/v1/completions", 404, prompt="a", model="features")["error"]["code"] == "model_not_found"


def test_as_many_texts_as_a_client_sends_at_once(features_bundle: Path) -> None:
    with running(of_bundle(features_bundle)) as server:
        assert len(server.post("/v1/embeddings", input=["a"] * 1000)["data"]) == 1000
        assert "input" in server.post("/v1/embeddings", 400, input=["a"] * 2049)["error"]["message"]


def test_texts_are_made_while_embeddings_wait(gated: tuple[Running, Gated]) -> None:
    server, gate = gated
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(server.post, "/v1/embeddings", input="a", model="features") for _ in range(2)]
        server.wait_until(lambda: server.served.features["features"].waiting == 2)
        assert not server.served.arrivals.coming, "texts do not wait for what is no text"
        assert server.complete("a", max_tokens=1, model="text")["usage"]["completion_tokens"] == 1
        error = server.post("/v1/embeddings", 429, input="a", model="features")["error"]
        assert error["code"] == "queue_full" and "2 requests for embeddings are waiting" in error["message"]
        gate.go.set()
        assert all(len(job.result()["data"]) == 1 for job in jobs)
    assert server.served.features["features"].waiting == 0


def test_a_client_that_is_gone_has_no_more_texts_embedded(gated: tuple[Running, Gated]) -> None:
    server, gate = gated
    body = b'{"model": "features", "input": ["a", "b", "c", "d"]}'
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(server.address) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        server.wait_until(lambda: gate.calls == 1)
    server.wait_until(lambda: server.served.features["features"].waiting == 0)
    gate.go.set()
    assert len(server.post("/v1/embeddings", input="a", model="features")["data"]) == 1
    assert gate.calls == 2
    lines = server.client.get("/metrics").text.splitlines()
    assert 'doge_num_requests_running{model_name="features"} 0.0' in lines
    counted = next(line for line in lines if line.startswith('doge_prompt_tokens_total{model_name="features"}'))
    assert float(counted.split()[-1]) > 0


@pytest.mark.parametrize(("seconds", "status"), [("600", 200), ("0", 503)])
def test_sigterm_lets_embeddings_end_or_says_that_there_is_no_time(
    features_bundle: Path, seconds: str, status: int
) -> None:
    count = 300 if status == 200 else 2000
    with (
        serving(features_bundle, "--drain-seconds", seconds) as (process, url),
        httpx.Client(base_url=url, timeout=500) as client,
        ThreadPoolExecutor() as pool,
    ):
        assert client.get("/health").status_code == 200
        job = pool.submit(client.post, "/v1/embeddings", json={"input": ["x = 1\n" * 60] * count})
        while 'running{model_name="doge-tiny"} 1.0' not in client.get("/metrics").text:
            assert not job.done()
        process.send_signal(signal.SIGTERM)
        found = job.result()
        assert found.status_code == status, found.text
        assert len(found.json().get("data", [])) == (300 if status == 200 else 0)
        assert process.wait(60) == 0
