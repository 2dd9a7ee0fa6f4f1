"""The scheduler behind the least that can be called a server: what HTTP must cost on this machine.

python bare.py BUNDLE PORT

One process as `doge-deploy serve` has it, with an engine's thread and an event loop. For each token of each text the
loop sends as many bytes as the server does, with one write for each text that has new tokens, since each client has its
own connection; but they are always the same bytes, nothing is checked, encoded or counted, and no framework stands
between. What is lost here against the scheduler alone, no server in this language gains.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from load import new_loop

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.options.generation import GenerationOptions
from doge_deploy.serve.model import Answering, ServedText
from doge_deploy.serve.request import Event, Finished, Produced
from doge_deploy.serve.start import ServeOptions, open_text


def _chunk(text: str, reason: str | None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    head = {"id": f"cmpl-{'0' * 24}", "object": "text_completion", "created": 1_700_000_000, "model": "int8"}
    event = b"data: " + json.dumps({**head, "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
PIECE, END = _chunk("w12345", None), _chunk("", "length") + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Bare:
    """All connections of one engine."""

    def __init__(self, bundle: Path) -> None:
        self.streams: dict[str, asyncio.Transport] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        options = ServeOptions(slots=16, speculate=False)
        self.model: ServedText = open_text(open_bundle(bundle), "bare", options, self._deliver)
        self.count = 0

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self._send, events)

    def _send(self, events: list[tuple[str, Event]]) -> None:
        written = Counter(name for name, event in events if isinstance(event, Produced))
        ended = {name for name, event in events if isinstance(event, Finished)}
        for name in written | Counter(ended):
            self.streams[name].write(PIECE * written[name] + END * (name in ended))
            if name in ended:
                self.streams.pop(name).close()

    def begin(self, body: bytes, transport: asyncio.Transport) -> None:
        """Answer a request."""
        asked = json.loads(body)
        self.count += 1
        answering = Answering(GenerationOptions(max_new_tokens=asked["max_tokens"]))
        request = self.model.request(f"r{self.count}", self.model.tokenizer.encode(asked["prompt"]), answering)
        self.streams[request.id] = transport
        transport.write(HEAD)
        self.model.engine.submit(request)


class Connection(asyncio.Protocol):
    """One request."""

    def __init__(self, server: Bare) -> None:
        self._server, self._received = server, b""

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """More of the request."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        if end and len(body) == int(length):
            self._server.begin(body, self._transport)


async def main() -> None:
    """Serve until the process is ended."""
    server = Bare(Path(sys.argv[1]))
    server.loop = asyncio.get_running_loop()
    server.model.engine.start()
    listening = await server.loop.create_server(lambda: Connection(server), "127.0.0.1", int(sys.argv[2]))
    await listening.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
