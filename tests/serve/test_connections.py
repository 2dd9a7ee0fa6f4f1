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
from doge_deploy.serve.http import connections, inbox, security
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


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
"""The head of a request whose body comes in chunks, without the line that ends it."""


@pytest.mark.parametrize(
    ("begun", "piece"),
    [
        (b"2\r\n{}\r\n0\r\n", b"X-Behind: " + b"a" * 4000 + b"\r\n"),
        (b"2\r\n{}\r\n0\r\nX-Behind: ", b"a" * 4000),
        (b"2;", b"a" * 4000),
    ],
    ids=["headers behind it", "one header behind it", "words of a chunk"],
)
@pytest.mark.parametrize("keys", [(), (b"secret",)], ids=["open", "without a key"])
def test_what_stands_around_a_body_is_bounded(
    tiny_bundle: Path, begun: bytes, piece: bytes, keys: tuple[bytes, ...]
) -> None:
    """Four times as much memory was taken for it, also of those who have no key and had their answer."""
    served = scripted(tiny_bundle, endless(tiny_bundle))
    with running(served, api_keys=keys) as server, connect(server) as connection:
        connection.sendall(CHUNKED + b"\r\n" + begun)
        with pytest.raises(ConnectionError):  # it is closed while this side still sends
            for _ in range(100 * connections.MAX_HEAD_BYTES // len(piece)):
                connection.sendall(piece)
        assert server.client.get("/health").status_code == 200


def test_headers_behind_a_body_are_none(tiny_bundle: Path) -> None:
    """A proxy has not looked at them."""
    body = json.dumps({"prompt": [7], "max_tokens": 1}).encode()
    chunks = b"%x\r\n%b\r\n0\r\nX-Request-Id: behind\r\nAuthorization: Bearer secret\r\n\r\n" % (len(body), body)
    kind = b"Content-Type: application/json\r\n"
    for keys, status in ((), b"200"), ((b"secret",), b"401"):
        served = scripted(tiny_bundle, endless(tiny_bundle))
        with running(served, api_keys=keys) as server, connect(server) as connection:
            connection.sendall(CHUNKED + kind + b"X-Request-Id: front\r\n\r\n" + chunks)
            received = b""
            while b"}" not in received:
                piece = connection.recv(65536)
                assert piece, received
                received += piece
            assert received.startswith(b"HTTP/1.1 " + status) and b"x-request-id: front\r\n" in received


def test_headers_are_counted(tiny_bundle: Path) -> None:
    """However short they are: 64 KiB of the shortest took 1.5 MB."""
    with running(scripted(tiny_bundle, endless(tiny_bundle))) as server:
        for number, status in ((connections.MAX_HEADERS, b"200"), (connections.MAX_HEADERS + 1, b"400")):
            with connect(server) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\n" + b"a:\r\n" * number + b"\r\n")
                answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 " + status)
        assert answer.endswith(f"A request has more than {connections.MAX_HEADERS} headers.".encode())


def test_a_head_behind_many_requests_is_not_theirs(tiny_bundle: Path) -> None:
    """What came before it in one piece does not count."""
    request = b"GET /health HTTP/1.1\r\nX-Fill: " + b"a" * 8000 + b"\r\n\r\n"
    with running(scripted(tiny_bundle, endless(tiny_bundle))) as server, connect(server) as connection:
        connection.sendall(request * 15 + request[:20])
        connection.sendall(request[20:])
        received = b""
        while received.count(b'"ok"') < 16:
            piece = connection.recv(65536)
            assert piece, received[-300:]
            received += piece
        assert received.count(b"HTTP/1.1 200") == 16


def test_bodies_behind_one_another_are_bounded(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held of all bodies is counted when their turn has come, which is not yet."""
    made: list[Any] = []
    before = connections.PatientProtocol.connection_made

    def noted(self: Any, transport: Any) -> None:
        made.append(self)
        before(self, transport)

    monkeypatch.setattr(connections.PatientProtocol, "connection_made", noted)
    slow = endless(tiny_bundle, seconds=0.1)
    behind = post({"prompt": "a" * 60_000})
    with running(scripted(tiny_bundle, slow)) as server, connect(server) as connection:
        connection.sendall(post({"prompt": [7], "max_tokens": 100}))
        server.wait_until(lambda: server.scheduler.running == 1)
        (protocol,) = made
        for _ in range(connections.MAX_PIPELINED - 1):
            connection.sendall(behind)
        server.wait_until(lambda: protocol.flow.read_paused or len(protocol.pipeline) == connections.MAX_PIPELINED - 1)
        held = sum(len(cycle.body) for cycle, _ in protocol.pipeline)
        at_once = 2**18  # is read, and once more where the answering of the first one begins meanwhile
        assert held <= connections.MAX_PIPELINED_BYTES + 2 * at_once < 60_000 * (connections.MAX_PIPELINED - 1)


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


def nested(number: int) -> bytes:
    """A body that holds so many lists, and is refused at the latest because of them."""
    return b'{"prompt":"a","max_tokens":1,"metadata":{"a":[' + b",".join([b"[]"] * (number - 3)) + b"]}}"


def test_what_a_body_is_made_of_is_bounded(tiny_bundle: Path) -> None:
    """Two bytes become a list of eighty; with millions of them the server stood still."""
    json_type = {"Content-Type": "application/json"}
    with running(scripted(tiny_bundle, endless(tiny_bundle))) as server:
        for number, status, said in (
            (security.MAX_BODY_PARTS, 400, "metadata: more than"),
            (security.MAX_BODY_PARTS + 1, 413, "[ and { together"),
        ):
            response = server.client.post("/v1/completions", content=nested(number), headers=json_type)
            assert response.status_code == status and said in response.json()["error"]["message"]
        length = b"0" * 5000 + str(len(nested(10))).encode()
        with connect(server) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n")
            connection.sendall(b"Content-Length: " + length + b"\r\n\r\n" + nested(10))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_what_bodies_together_are_made_of_is_bounded(tiny_bundle: Path) -> None:
    served = scripted(tiny_bundle, endless(tiny_bundle))
    with running(served, max_held_bytes=100_000) as server, connect(server) as connection:
        begun = nested(600)
        connection.sendall(post({}, 5000).partition(b"{}")[0] + begun[:-1])  # which is 2,000 bytes
        server.wait_until(lambda: server.served.working == 1)

        def status() -> int:
            json_type = {"Content-Type": "application/json"}
            return server.client.post("/v1/completions", content=nested(600), headers=json_type).status_code

        server.wait_until(lambda: status() == 429)  # as soon as the other body has come
        connection.close()
        server.wait_until(lambda: server.served.working == 0)
        assert [status() for _ in range(3)] == [200] * 3


@pytest.mark.parametrize("value", [{"a": [[]] * 1024}, {str(i): i for i in range(1025)}, {"a": [{"b": [0] * 1022}]}])
def test_metadata_is_small(tiny_bundle: Path, value: dict[str, Any]) -> None:
    with running(scripted(tiny_bundle, endless(tiny_bundle))) as server:
        error = server.post("/v1/completions", 400, prompt=[7], metadata=value)["error"]
        assert error["param"] == "metadata" and "more than 1024 values" in error["message"]


def test_a_request_that_can_never_be_queued_is_not_told_to_come_again(tiny_bundle: Path) -> None:
    """Of an idle server those that get a slot at once do not wait."""
    served = scripted(tiny_bundle, endless(tiny_bundle, slots=3), Limits(queue_requests=1))
    with running(served) as server:
        for texts, param in (({"prompt": ["a", "b"], "n": 3}, "n"), ({"prompt": ["a", "b", "c", "d", "e"]}, "prompt")):
            error = server.post("/v1/completions", 400, **texts)["error"]
            number = len(texts["prompt"]) * texts.get("n", 1)
            said = f"{param}: {number} texts in one request; this server takes at most 4"
            assert said in error["message"] and error["param"] == param
        assert len(server.complete(["a", "b"], n=2, max_tokens=2)["choices"]) == 4


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
