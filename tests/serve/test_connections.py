"""Clients that are slow, silent or gone: what they hold is given back, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import NAME, Running, SlowSlots, running, scripted

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.serve.http import connections, inbox
from doge_deploy.serve.http.connections import Patience
from doge_deploy.serve.scheduler import Limits

SHORT = Patience(receive_seconds=0.6, read_seconds=0.6)


def endless(tiny_bundle: Path, slots: int = 4, seconds: float = 0.0) -> SlowSlots:
    """Slots whose texts do not end by themselves."""
    vocab = open_bundle(tiny_bundle).manifest.facts.vocab_size
    return SlowSlots(slots, rule=lambda history: 70, vocab=vocab, max_length=512, seconds=seconds)


def connect(server: Running, *, receive_bytes: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect(server.address)
    connection.settimeout(60)
    return connection


def post(body: dict[str, Any], length: int | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(content) if length is None else length}\r\n\r\n".encode() + content


def wait_until_closed(connection: socket.socket, trickle: Iterator[bytes] | None = None) -> None:
    """Until the server has closed the connection, while bytes of `trickle` are sent one after another."""
    start = time.monotonic()
    connection.settimeout(0.05 if trickle else 60)
    while True:
        try:
            if trickle is not None:
                connection.sendall(next(trickle))
            if not connection.recv(65536):
                return
        except TimeoutError:
            assert trickle is not None and time.monotonic() - start < 60, "it was not closed"
        except OSError:  # reset
            return


def read_until(connection: socket.socket, mark: bytes, times: int = 1) -> bytes:
    """What comes until `mark` was there so often."""
    received = b""
    while received.count(mark) < times:
        piece = connection.recv(65536)
        assert piece, "it was closed"
        received += piece
    return received


@pytest.mark.parametrize(
    "begun",
    [b"", b"POST /v1/completions HT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", post({"prompt": "a"}, 5000)],
    ids=["nothing", "part of a line", "part of the head", "part of the body"],
)
def test_a_request_that_does_not_come_is_not_waited_for(tiny_bundle: Path, begun: bytes) -> None:
    with running(scripted(tiny_bundle, endless(tiny_bundle)), patience=SHORT) as server:
        start = time.monotonic()  # the server's time begins later
        with connect(server) as connection:
            connection.sendall(begun)
            wait_until_closed(connection)
        assert time.monotonic() - start >= SHORT.receive_seconds
        server.wait_until(lambda: server.served.working == 0)
        assert server.complete([7], max_tokens=3)["choices"]


def test_headers_that_come_byte_by_byte_are_not_waited_for(tiny_bundle: Path) -> None:
    def letters() -> Iterator[bytes]:
        yield b"GET /health HTTP/1.1\r\nX-Slow: "
        while True:
            yield b"a"

    with running(scripted(tiny_bundle, endless(tiny_bundle)), patience=SHORT) as server, connect(server) as connection:
        wait_until_closed(connection, letters())


@pytest.mark.parametrize("piece", [b"X-Long: " + b"a" * 4000 + b"\r\n", b"a" * 4000], ids=["lines", "one line"])
def test_a_head_without_end_is_refused(tiny_bundle: Path, piece: bytes) -> None:
    patience = Patience(receive_seconds=600)
    with (
        running(scripted(tiny_bundle, endless(tiny_bundle)), patience=patience) as server,
        connect(server) as connection,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nX-First: ")
        with contextlib.suppress(OSError):  # it is closed while this side still sends
            for _ in range(3 * connections.MAX_HEAD_BYTES // len(piece)):
                connection.sendall(piece)
        wait_until_closed(connection)
        assert server.complete([7], max_tokens=3)["choices"]


def test_requests_may_be_sent_before_the_answer_of_the_one_before(tiny_bundle: Path) -> None:
    with running(scripted(tiny_bundle, endless(tiny_bundle))) as server, connect(server) as connection:
        connection.sendall(post({"prompt": [7], "max_tokens": 2}) * 3)
        assert read_until(connection, b'"usage"', 3).count(b"HTTP/1.1 200") == 3


def test_a_connection_may_wait_for_its_next_request(tiny_bundle: Path) -> None:
    body = post({"prompt": [7], "max_tokens": 2})
    with running(scripted(tiny_bundle, endless(tiny_bundle)), patience=SHORT) as server:
        with server.standing():  # the request is there when the server's time begins
            connection = connect(server)
            connection.sendall(body)
        with connection:
            read_until(connection, b'"usage"')
            time.sleep(1.5 * SHORT.receive_seconds)
            connection.sendall(body)
            read_until(connection, b'"usage"')


def test_a_long_answer_takes_longer_than_a_request_may(tiny_bundle: Path) -> None:
    seconds, tokens = 0.02, 60
    assert tokens * seconds >= 2 * SHORT.receive_seconds
    with running(scripted(tiny_bundle, endless(tiny_bundle, seconds=seconds)), patience=SHORT) as server:
        with server.standing():  # the request is there when the server's time begins
            connection = connect(server)
            connection.sendall(post({"prompt": [7], "max_tokens": tokens}))
        with connection:
            assert f'"completion_tokens":{tokens}'.encode() in read_until(connection, b'"total_tokens"')


WIDE = {"prompt": [7], "max_tokens": 500, "n": 4, "stream": True, "logprobs": 20}
"""An answer of about two megabytes: more than is held for a connection."""


class TestReaders:
    @pytest.fixture(autouse=True)
    def small_buffers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connections, "_SEND_BUFFER_BYTES", 8192)

    @pytest.mark.parametrize("system_helps", [True, False], ids=["", "by the server alone"])
    def test_one_that_does_not_read_is_cut_off(
        self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, system_helps: bool
    ) -> None:
        if not system_helps:
            monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
        slots = endless(tiny_bundle, slots=5)
        slots.hold()
        patience = Patience(read_seconds=0.6)
        with running(scripted(tiny_bundle, slots), patience=patience) as server, ThreadPoolExecutor() as pool:
            with connect(server, receive_bytes=4096) as connection:
                connection.sendall(post(WIDE))
                server.wait_until(lambda: server.served.working == 1)
                other = pool.submit(server.complete, [8], max_tokens=400)
                server.wait_until(lambda: server.served.working == 2)
                slots.go.set()
                server.wait_until(lambda: server.served.working == 0)
                received = 0
                with pytest.raises(ConnectionResetError):
                    while piece := connection.recv(65536):
                        received += len(piece)
                assert received < 1_000_000  # it has got what was under way, and no more
            assert other.result()["usage"]["completion_tokens"] == 400
            server.wait_until(server.at_rest)  # within a step
            assert server.scheduler.table.busy == 0

    def test_one_that_reads_slowly_gets_everything(self, tiny_bundle: Path) -> None:
        """Though the server has not got rid of what it holds when it looks."""
        patience = Patience(read_seconds=0.5)
        with running(scripted(tiny_bundle, endless(tiny_bundle)), patience=patience) as server:
            for _ in range(20):
                received, longest = self.read_slowly(server)
                if received.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
                    break
                # or the machine stood still
                assert longest > patience.read_seconds / 2, "it was cut off though it read"
            assert received.count(b'"finish_reason":"length"') == 1 and b"[DONE]" in received

    def read_slowly(self, server: Running) -> tuple[bytes, float]:
        """What came, and the longest time in seconds between two reads."""
        received, longest = b"", 0.0
        body = WIDE | {"n": 1, "max_tokens": 150}
        with connect(server, receive_bytes=4096) as connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(post(body).replace(b"Host: x", b"Host: x\r\nConnection: close"))
            last = time.monotonic()
            while piece := connection.recv(2048):
                received += piece
                time.sleep(0.04)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
        return received, longest

    @pytest.mark.parametrize("n", [1, 3])
    def test_what_waits_for_one_is_bounded(self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        monkeypatch.setattr(inbox, "MAX_UNREAD", 20)
        served = scripted(tiny_bundle, endless(tiny_bundle, slots=n + 1))
        with running(served, patience=Patience()) as server, connect(server, receive_bytes=4096) as connection:
            connection.sendall(post(WIDE | {"n": n}).replace(b"Host: x", b"Host: x\r\nConnection: close"))
            finished = server.scheduler.counters.finished
            server.wait_until(lambda: sum(finished.values()) == n)  # though nothing was read yet
            assert finished["cancelled"] >= 1
            received = b""
            while piece := connection.recv(65536):
                received += piece
        assert b'"code":"stream_not_read"' in received.replace(b": ", b":") and received.count(b"[DONE]") == 1
        assert server.served.inboxes[NAME].waiting == 0


def test_more_connections_than_are_taken_are_closed_at_once(tiny_bundle: Path) -> None:
    patience = Patience(receive_seconds=600, connections=4)
    with (
        running(scripted(tiny_bundle, endless(tiny_bundle)), patience=patience) as server,
        contextlib.ExitStack() as opened,
    ):
        held = [opened.enter_context(connect(server)) for _ in range(4)]
        for connection in held:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        with connect(server) as late:
            wait_until_closed(late)
        held[0].close()
        server.wait_until(lambda: len(server.connections) == 3)
        assert server.complete([7], max_tokens=2)["choices"]


def test_bodies_together_are_bounded(tiny_bundle: Path) -> None:
    served = scripted(tiny_bundle, endless(tiny_bundle))
    with running(served, max_held_bytes=100_000) as server, connect(server) as connection:
        connection.sendall(post({"prompt": "a" * 90_000}, 95_000))  # the last bytes do not come
        server.wait_until(lambda: server.served.working == 1)
        large = {"prompt": "b" * 20_000}
        # which is too long to be answered, and is told so as long as the other body has not come
        server.wait_until(lambda: server.client.post("/v1/completions", json=large).status_code == 429)
        response = server.client.post("/v1/completions", json=large)
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert server.complete([7], max_tokens=2)["choices"]
        connection.close()
        server.wait_until(lambda: server.served.working == 0)
        assert server.client.post("/v1/completions", json=large).status_code == 400


def test_a_request_that_can_never_be_queued_is_not_told_to_come_again(tiny_bundle: Path) -> None:
    served = scripted(tiny_bundle, endless(tiny_bundle), Limits(queue_requests=8))
    with running(served) as server:
        error = server.post("/v1/completions", 400, prompt=["a", "b", "c"], n=3)["error"]
        assert "9 texts in one request; this server takes at most 8" in error["message"] and error["param"] == "n"


@pytest.mark.parametrize(
    ("options", "param"), [({"prompt": [[5] * 300] * 6}, "prompt"), ({"prompt": [5] * 300, "n": 6}, "n")]
)
def test_a_request_of_more_tokens_than_may_ever_wait_is_not_told_to_come_again(
    tiny_bundle: Path, options: dict[str, Any], param: str
) -> None:
    """Two of six texts get a slot, so that those of four would wait."""
    served = scripted(tiny_bundle, endless(tiny_bundle, slots=2), Limits(queue_tokens=1199))
    assert served.texts[NAME].engine.scheduler.runner.slots == 2
    with running(served) as server:
        error = server.post("/v1/completions", 400, max_tokens=1, **options)["error"]
        for said in ("1800 prompt tokens in one request", "1200 prompt tokens would be waiting; the limit is 1199"):
            assert said in error["message"]
        assert error["param"] == param and error["code"] is None


def test_a_request_of_as_many_tokens_as_may_wait_is_taken(tiny_bundle: Path) -> None:
    served = scripted(tiny_bundle, endless(tiny_bundle, slots=2), Limits(queue_tokens=1200))
    with running(served) as server:
        assert len(server.complete([[5] * 300] * 6, max_tokens=1)["choices"]) == 6
