"""Requests that are legal but that few clients send, and bodies of other kinds than the server takes."""

from __future__ import annotations

import gzip
import io
import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import NAME, Running, SlowSlots, running, scripted

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.errors import UsageError
from doge_deploy.serve import logs
from doge_deploy.serve.http import connections
from doge_deploy.serve.http.security import read_keys
from doge_deploy.text.tokenizer import Tokenizer

BODY = {"prompt": [7], "max_tokens": 2}

HTTP2_OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
"""What Java's `HttpClient` sends with every request as long as nobody tells it not to, and `curl --http2`."""


def endless(tiny_bundle: Path, *, slots: int = 2, seconds: float = 0.0) -> SlowSlots:
    """Slots whose texts do not end by themselves."""
    vocab = open_bundle(tiny_bundle).manifest.facts.vocab_size
    return SlowSlots(slots, rule=lambda history: 70, vocab=vocab, max_length=512, seconds=seconds)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    """Quick slots."""
    with running(scripted(tiny_bundle, endless(tiny_bundle))) as found:
        yield found


def connect(server: Running) -> socket.socket:
    return socket.create_connection(server.address, timeout=60)


def head(headers: str, method: str = "POST", path: str = "/v1/completions") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}\r\n".encode()


def whole(body: Any, headers: str = "") -> bytes:
    content = json.dumps(body).encode()
    return head(f"{headers}Content-Length: {len(content)}\r\n") + content


def read(connection: socket.socket, mark: bytes, times: int = 1) -> bytes:
    """What comes until `mark` was there so often."""
    received = b""
    while received.count(mark) < times:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


class TestOffersOfAnotherProtocol:
    """An `Upgrade` is an offer: who does not take it goes on as if it was not there."""

    @pytest.mark.parametrize("pieces", [1, 7], ids=["at once", "in pieces"])
    @pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
    def test_a_body_arrives(self, server: Running, chunked: bool, pieces: int) -> None:
        request = whole(BODY, HTTP2_OFFER)
        if chunked:
            content = json.dumps(BODY).encode()
            request = head(f"{HTTP2_OFFER}Transfer-Encoding: chunked\r\n") + b"%x\r\n%b\r\n0\r\n\r\n" % (
                len(content),
                content,
            )
        size = -(-len(request) // pieces)
        with connect(server) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(2):  # and the connection goes on
                for begin in range(0, len(request), size):
                    connection.sendall(request[begin : begin + size])
                answer = read(connection, b'"usage"')
                assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1

    def test_requests_behind_one_another(self, server: Running) -> None:
        with connect(server) as connection:
            connection.sendall(head(HTTP2_OFFER, "GET", "/health") * 2 + whole(BODY, HTTP2_OFFER))
            answers = read(connection, b'"usage"')
        assert answers.count(b"HTTP/1.1 200") == 3 and answers.count(b'{"status":"ok"}') == 2

    def test_a_web_socket_is_not_opened(self, server: Running) -> None:
        offer = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2V5\r\n"
        with connect(server) as connection:
            connection.sendall(head(offer, "GET", "/health"))
            assert read(connection, b'{"status":"ok"}').startswith(b"HTTP/1.1 200")

    def test_a_tunnel_is_refused(self, server: Running) -> None:
        for target in ("example.org:443", "/health"):
            with connect(server) as connection:
                connection.sendall(head("", "CONNECT", target))
                assert connection.recv(65536).startswith(b"HTTP/1.1 40")
        assert server.complete([7], max_tokens=1)["choices"]


class TestRequestsBehindOneAnother:
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize("behind", [1, 3])
    @pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
    def test_a_client_that_leaves_frees_its_slot(
        self, tiny_bundle: Path, later: bool, behind: int, stream: bool
    ) -> None:
        served = scripted(tiny_bundle, endless(tiny_bundle, slots=1, seconds=0.01))
        with running(served) as server:
            with connect(server) as connection:
                first = whole({"prompt": [7], "max_tokens": 500, "stream": stream})
                connection.sendall(first if later else first + whole(BODY) * behind)
                server.wait_until(lambda: server.scheduler.running == 1)
                if later:
                    connection.sendall(whole(BODY) * behind)
            server.wait_until(lambda: server.served.working == 0)
            counters = server.scheduler.counters
            server.wait_until(lambda: bool(counters.finished))
            assert counters.finished == {"cancelled": 1} and counters.generated_tokens < 400

    def test_many_are_answered_in_their_order(self, server: Running) -> None:
        number = 3 * connections.MAX_PIPELINED
        with connect(server) as connection, ThreadPoolExecutor() as pool:
            sent = pool.submit(
                connection.sendall, b"".join(whole({"prompt": [7] * n, "max_tokens": 1}) for n in range(1, number + 1))
            )
            answers = read(connection, b'"usage"', number)
            answers += read(connection, b"}", 1) if not answers.endswith(b"}") else b""
            sent.result()
        found = [int(part.split(b",")[0]) for part in answers.split(b'"prompt_tokens":')[1:]]
        assert found == list(range(1, number + 1))

    def test_one_that_closes_its_sending_half_is_gone(self, tiny_bundle: Path) -> None:
        """As nginx has it: the system tells the same of a client that is there no more."""
        served = scripted(tiny_bundle, endless(tiny_bundle, slots=1, seconds=0.01))
        with running(served) as server, connect(server) as connection:
            connection.sendall(whole({"prompt": [7], "max_tokens": 500}))
            server.wait_until(lambda: server.scheduler.running == 1)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(65536) == b""
            server.wait_until(lambda: server.scheduler.counters.finished == {"cancelled": 1})


@pytest.mark.parametrize("form", ["text", "json"])
def test_nobody_writes_lines_into_the_log(server: Running, form: Any) -> None:
    """Of a path that was decoded a line end would begin a line, and a control sequence would move the cursor."""
    names = ("doge_deploy.serve", "uvicorn", "asyncio")
    before = [(one := logging.getLogger(name), one.handlers, one.propagate, one.level) for name in names]
    try:
        logs.configure(form)
        (handler,) = logging.getLogger("doge_deploy.serve").handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(written := io.StringIO())
        path = "/a%0A12:00:00%20serving%1b[2J%20status=200%E2%80%A8%85"
        assert server.client.get(path, headers={"X-Request-Id": "mine"}).status_code == 404
        # it is written after the answer has been sent; before it there may be lines of the test before
        own = lambda: written.getvalue().partition("mine")[2]  # noqa: E731
        server.wait_until(lambda: "404" in own())
        line = own().removesuffix("\n")
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
    assert line.isprintable() and line.count("status=") + line.count('"status":') == 1 and "404" in line


class TestHead:
    @pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/v1/models", f"/v1/models/{NAME}"])
    def test_it_is_a_get_without_the_body(self, server: Running, path: str) -> None:
        """Load balancers ask so."""
        full, found = server.client.get(path), server.client.head(path)
        assert (found.status_code, found.content) == (200, b"")
        assert found.headers["content-type"] == full.headers["content-type"]
        if path != "/metrics":  # which changes
            assert found.headers["content-length"] == full.headers["content-length"]

    def test_what_is_not_there(self, server: Running) -> None:
        assert server.client.head("/nothing").status_code == 404
        assert server.client.head("/v1/completions").status_code == 405
        assert server.client.delete("/health").headers["allow"] == "GET, HEAD"
        assert server.client.get("/v1/completions").headers["allow"] == "POST"

    def test_a_key_is_needed_as_for_a_get(self, tiny_bundle: Path) -> None:
        with running(scripted(tiny_bundle, endless(tiny_bundle)), api_keys=(b"a key",)) as server:
            assert [server.client.head(path).status_code for path in ("/health", "/metrics")] == [200, 401]
            key = {"Authorization": "bearer  a key"}
            assert server.client.head("/metrics", headers=key).status_code == 200


class TestKeys:
    def test_a_file_as_any_editor_writes_it(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_bytes(b"\xef\xbb\xbffirst key\r\n# no key\r\n\r\n  cl\xc3\xa9  \r\nlast")
        assert read_keys(file) == (b"first key", "clé".encode(), b"last")

    @pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n \n# none\n", b"\xff\xfe"])
    def test_a_file_without_keys_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (file := tmp_path / "keys").write_bytes(content)
        with pytest.raises(UsageError, match=r"--api-key-file .*keys: (holds no key|cannot be read)"):
            read_keys(file)

    @pytest.mark.parametrize("header", ["Bearer first key", "bearer   first key", "BEARER clé"])
    def test_a_key_may_hold_blanks_and_any_character(self, tiny_bundle: Path, header: str) -> None:
        with running(scripted(tiny_bundle, endless(tiny_bundle)), api_keys=(b"first key", "clé".encode())) as server:
            for value, status in ((header, 200), (f"{header}x", 401), (header[:-1], 401)):
                response = server.client.get("/v1/models", headers={"Authorization": value.encode()})
                assert response.status_code == status


JSON = json.dumps(BODY).encode()
TYPE = {"Content-Type": "application/json"}


class TestBodies:
    """Whatever comes, the answer says what is wrong with it."""

    @pytest.mark.parametrize(
        ("content", "headers", "status", "said"),
        [
            (
                gzip.compress(JSON, mtime=0),
                {**TYPE, "Content-Encoding": "gzip"},
                415,
                "Content-Encoding: gzip is not taken",
            ),
            (b'{"a"', {**TYPE, "Content-Encoding": "br"}, 415, "Content-Encoding: br is not taken"),
            (JSON, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/x-www-form-urlencoded"),
            (JSON, {"Content-Type": "text/plain; charset=utf-8"}, 415, "must be application/json"),
            (JSON, {}, 415, "Content-Type"),
            ('{"prompt": "é"}'.encode("latin-1"), TYPE, 400, "not UTF-8"),
            (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", TYPE, 400, "digits"),
            (b'{"prompt": "a", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, TYPE, 400, "nested"),
            (b"", TYPE, 400, "the body is empty"),
            (b"[1]", TYPE, 400, "the body must be a JSON object"),
            (b'"text"', TYPE, 400, "the body must be a JSON object"),
        ],
    )
    def test_what_is_not_taken(
        self, server: Running, content: bytes, headers: dict[str, str], status: int, said: str
    ) -> None:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            response = server.client.post(path, content=content, headers=headers)
            assert response.status_code == status and said in response.json()["error"]["message"], response.text

    @pytest.mark.parametrize(
        ("content", "headers"),
        [
            (JSON, {**TYPE, "Content-Encoding": "identity"}),
            (JSON, {"Content-Type": 'application/json; charset="utf-8"'}),
            (b"\xef\xbb\xbf" + JSON, TYPE),
            (b" \r\n" + JSON + b"\n", TYPE),
            (JSON, {**TYPE, "Expect": "100-continue"}),
        ],
    )
    def test_what_is_taken(self, server: Running, content: bytes, headers: dict[str, str]) -> None:
        response = server.client.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 200, response.text

    @pytest.mark.parametrize("name", ["a b", "", "\N{DOG FACE}", "a.b", "x\n"])
    def test_an_unknown_field_is_named_whatever_its_name(self, server: Running, name: str) -> None:
        error = server.post("/v1/completions", 400, prompt="a", **{name: 1})["error"]
        assert error["message"].startswith(repr(name)) and error["code"] == "unsupported_parameter"
        error = server.post("/v1/completions", 400, prompt="a", stream=True, stream_options={name: 1})["error"]
        assert error["message"].startswith(f"stream_options.{name!r}")

    def test_an_answer_is_not_as_long_as_a_name(self, server: Running) -> None:
        response = server.client.post("/v1/completions", json={"prompt": "a", "x" * 1_000_000: 1})
        assert response.status_code == 400 and len(response.content) < 2000

    @pytest.mark.parametrize(
        ("value", "wrong"),
        [(["a", [5]], 1), ([[5], "a"], 1), ([5, "a"], 1), ([5, 6.0], 1), ([True], 0), ([None, "a"], 0)],
    )
    def test_texts_and_ids_are_not_mixed(self, server: Running, value: Any, wrong: int) -> None:
        error = server.post("/v1/completions", 400, prompt=value)["error"]
        assert error["message"].startswith(f"prompt: entry {wrong} ") and error["param"] == "prompt"

    def test_a_token_that_is_none_has_no_text(self, server: Running) -> None:
        error = server.post("/detokenize", 400, tokens=[5, 99999])["error"]
        assert "99999" in error["message"]

    def test_null_is_not_given(self, server: Running) -> None:
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        for name in ("function_call", "audio", "prediction", "verbosity", "web_search_options", "tools", "functions"):
            assert server.post("/v1/chat/completions", **chat, **{name: None})["choices"]
            assert name in server.post("/v1/chat/completions", 400, **chat, **{name: {"a": 1}})["error"]["message"]
        assert server.post("/v1/chat/completions", **chat, logprobs=False, top_logprobs=0)["choices"]
        assert server.post("/v1/chat/completions", **chat, function_call="none")["choices"]


class TestTexts:
    @pytest.mark.parametrize("logprobs", [None, 0])
    def test_no_line_of_a_stream_ends_within_a_text(self, tiny_bundle: Path, logprobs: int | None) -> None:
        """Python's `str.splitlines`, by which httpx reads lines, knows more ends of a line than JSON escapes."""
        text = "a\x85b\u2028c\u2029d\x0be\x1c"
        prompt = [70]
        ids = Tokenizer.from_directory(tiny_bundle).ids(text, add_special_tokens=False)
        vocab = open_bundle(tiny_bundle).manifest.facts.vocab_size
        slots = SlowSlots(1, rule=lambda past: [*ids, 1][len(past) - len(prompt)], vocab=vocab, max_length=512)
        with running(scripted(tiny_bundle, slots)) as server:
            chunks = server.stream("/v1/completions", prompt=prompt, max_tokens=100, logprobs=logprobs)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text

    def test_no_token_is_no_token(self, server: Running) -> None:
        options = {"prompt": [[7, 8], [9]], "max_tokens": 0, "echo": True, "n": 2}
        texts = [server.post("/detokenize", tokens=ids)["prompt"] for ids in ([7, 8], [7, 8], [9], [9])]
        whole = server.complete(**options)
        assert [choice["text"] for choice in whole["choices"]] == texts and whole["usage"]["completion_tokens"] == 0
        assert {choice["finish_reason"] for choice in whole["choices"]} == {"length"}
        streamed = ["", "", "", ""]
        for chunk in server.stream("/v1/completions", **options):
            streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert streamed == texts

    def test_offsets_are_places_in_the_text(self, tiny_bundle: Path) -> None:
        """Also behind characters of several tokens, and special tokens that are echoed."""
        tokenizer = Tokenizer.from_directory(tiny_bundle)
        plain = tokenizer.ids("one é two\N{DOG FACE} three four\N{DOG FACE}", add_special_tokens=False)
        prompt = [0, *plain, 5, *plain]
        said = [*plain, 6, *plain, 1]
        vocab = open_bundle(tiny_bundle).manifest.facts.vocab_size
        rule = lambda past: said[len(past) - len(prompt)]  # noqa: E731
        slots = SlowSlots(1, rule=rule, vocab=vocab, max_length=512)
        slots.all_logits = True
        with running(scripted(tiny_bundle, slots)) as server:
            options = {"prompt": prompt, "max_tokens": len(said), "logprobs": 0}
            whole = server.complete(**options, echo=True)["choices"][0]
            without = server.complete(**options)["choices"][0]
            chunks = server.stream("/v1/completions", **options, echo=True)
        for choice in (whole, without):
            text, found = choice["text"], choice["logprobs"]
            places = list(zip(found["tokens"], found["text_offset"], strict=True))
            checked = 0
            for token, place in places:
                if not token.startswith("bytes:") and not (token.startswith("<|") and token not in text):
                    assert text[place : place + len(token)] == token
                    checked += 1
            assert checked >= 4 and places[-1][1] == len(text)  # the token that ends the text has none
        streamed = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {}).get("text_offset", [])]
        assert streamed == whole["logprobs"]["text_offset"]
