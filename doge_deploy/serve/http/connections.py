"""Connections on which nothing moves are closed: whoever is gone, or does not read, must not hold memory for ever.

Four rules, beside uvicorn's own time for a connection that waits for its next request:

- a request must be there whole `receive_seconds` after its first byte, and the first one so long after the connection
  was opened: headers that come one byte a second hold a connection no longer than that. A head of more than
  `MAX_HEAD_BYTES` or `MAX_HEADERS` is refused at once, and so is a body in chunks of which as much comes without a byte
  of the body itself: headers may stand behind it too, and each chunk may have words of its own. Nobody needs either, so
  what comes so is dropped;
- a client that takes nothing of what was sent to it for `read_seconds` is cut off. While it reads, however slowly, it
  is not; what is written to it waits meanwhile, since uvicorn writes no more than a buffer ahead;
- the system asks after clients that are silent (keep-alive probes), so that one that lost its power is noticed;
- beyond `connections` at once a new one is closed at once: the others need their files.

Two things more that uvicorn leaves out: a client that goes away is noticed by all of its requests, not by the last one
alone, and an offer to go on in another protocol is passed over, as HTTP has it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Of the first line and the headers of a request."""

MAX_HEADERS = 256
"""Each of them takes some hundred bytes of memory, however short it is."""

MAX_PIPELINED, MAX_PIPELINED_BYTES = 16, 64 * 1024
"""Requests behind the one that is answered, and what their bodies have together; beyond either nothing is read, so it
is not noticed that the client goes."""

_SEND_BUFFER_BYTES = 256 * 1024
"""Of the system, for each connection: without a limit it grows to megabytes for a client that does not read."""

_PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""After so many seconds of silence a probe, the next so many seconds later, and so many of them."""


@dataclass(frozen=True)
class Patience:
    """How long a connection may stand still, and how many there may be."""

    receive_seconds: float = 60.0
    read_seconds: float = 60.0
    connections: int = 4096


class _Parser(httptools.HttpRequestParser):
    """httptools' parser, for clients that offer another protocol (`Upgrade: h2c`): Java's do so with every request.

    The parser takes the offer for accepted, and what follows the head, a body that was announced there included, for
    that protocol's. So the head is parsed once more without the offer, and what follows it after that.

    Args:
        protocol: gets the events.
        head_without_offer: the latest head, to be parsed instead; empty where there was no offer.
    """

    def __init__(self, protocol: object, head_without_offer: Callable[[], bytes]) -> None:
        super().__init__(protocol)
        self._head_without_offer = head_without_offer
        if hasattr(self, "set_dangerous_leniencies"):  # as uvicorn sets it
            self.set_dangerous_leniencies(lenient_data_after_close=True)

    def feed_data(self, data: Any) -> None:
        """More of a request."""
        while True:
            try:
                super().feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                head = self._head_without_offer()
                if not head:
                    raise
                data = head + bytes(data[stopped.args[0] :])


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which closes connections as the module says. Of its two parsers the one written in C: that in
    Python takes as long for each piece of a stream as all else that is done for it here.
    """

    patience = Patience()

    _refused = False
    _whole = False
    """All of the latest request is there."""
    _in_head = False
    """Its head is not there whole."""
    _bare, _moved = 0, False
    """How many bytes came since something of a body or the end of a request; whether the latest ones had some of it."""
    _refusal = ""
    """What is wrong with a request, where this class found it and not the parser."""
    _receiving: asyncio.TimerHandle | None = None
    """Runs while a request is not there whole."""
    _unread: asyncio.TimerHandle | None = None
    """Runs while the client has not read something that was sent."""
    _answered: Any = None
    """uvicorn's object of the request that is being answered; its `cycle` is that of the latest one that came."""
    _without_offer = b""
    """The head of a request that offers another protocol, without that offer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parser = _Parser(self, lambda: self._without_offer)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        if len(self.connections) >= self.patience.connections:
            self._refused = True
            transport.abort()
            return
        super().connection_made(transport)
        _watch_peer(transport.get_extra_info("socket"), self.patience.read_seconds)
        self._receiving = self.loop.call_later(self.patience.receive_seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone, or was closed from here."""
        for timer in (self._receiving, self._unread):
            if timer is not None:
                timer.cancel()
        if self._refused:
            return
        answered = self._answered
        if answered is not None and not answered.response_complete:
            answered.disconnected = True
            answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        if self._refused:
            return
        if self.cycle is None or self.cycle.response_complete:
            self._whole = False  # whatever it is, it is no request yet
        self._moved = False
        super().data_received(data)
        self._bare = 0 if self._moved else self._bare + len(data)
        if self._bare > MAX_HEAD_BYTES:
            what = "The head of a request is" if self._in_head else "What stands around a request's body is"
            self.send_400_response(f"{what} larger than {MAX_HEAD_BYTES} bytes.")
        if self._whole:
            self._stop_receiving()
        elif self._receiving is None:
            self._receiving = self.loop.call_later(self.patience.receive_seconds, self.transport.abort)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._whole, self._in_head = False, True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers; those behind its body are dropped: what a proxy has checked stands in front of it."""
        if not self._in_head:
            return
        if len(self.headers) == MAX_HEADERS:
            self._refusal = f"A request has more than {MAX_HEADERS} headers."
            raise ValueError(self._refusal)  # the parser stops, and `send_400_response` is called
        super().on_header(name, value)

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong, and close."""
        super().send_400_response(self._refusal or msg)

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._in_head = False
        self._without_offer = b""
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._without_offer = self._head_without_offer()
            return
        super().on_headers_complete()
        held = sum(len(cycle.body) for cycle, _ in self.pipeline)
        if len(self.pipeline) < MAX_PIPELINED and held <= MAX_PIPELINED_BYTES:
            self.flow.resume_reading()  # else it would not be noticed that the client goes away

    def _head_without_offer(self) -> bytes:
        first = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"".join((first, *lines, b"\r\n"))

    def on_body(self, body: bytes) -> None:
        """More of its body."""
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """It is there whole."""
        if self._without_offer:
            return  # its head comes once more
        self._whole = self._moved = True
        super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return False

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _stop_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def pause_writing(self) -> None:
        """More waits for the client than is held for it: nothing is written until it has read."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client has read most of it."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        if self.cycle is not None and self.cycle.response_complete:
            self._watch_reader()

    def on_response_complete(self) -> None:
        """The answer is written, which does not mean that it was read."""
        super().on_response_complete()
        self._watch_reader()

    def _watch_reader(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        if waiting and self._unread is None:
            self._unread = self.loop.call_later(self.patience.read_seconds, self._check_reader, waiting)

    def _check_reader(self, before: int) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size() >= before:
            _forget_unsent(self.transport.get_extra_info("socket"))
            self.transport.abort()
        else:
            self._watch_reader()


def _forget_unsent(connection: socket.socket | None) -> None:
    """At its end the system drops what it still holds for the peer, instead of trying for minutes to deliver it."""
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def patient(patience: Patience) -> type[PatientProtocol]:
    """The protocol for `uvicorn.Config(http=...)` with these numbers."""
    return type("PatientProtocol", (PatientProtocol,), {"patience": patience})


def _watch_peer(connection: socket.socket | None, read_seconds: float) -> None:
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    options = {**_PROBES, "TCP_USER_TIMEOUT": int(read_seconds * 1000)}
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def raise_file_limit(wanted: int) -> int:
    """Let this process open more files, as far as the system allows; how many it may open then.

    A connection is a file, and many systems allow 1,024 where nobody asks for more.
    """
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
