"""Clients that stream completions in a closed loop: each asks again as soon as its answer has ended.

The client is written on asyncio's protocols alone, because whatever it costs is taken from the server on a small
machine: a line of a stream is only searched for, not parsed. `Load.client_cpu` says what it took.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass
class Load:
    """What one run of some clients saw; times in seconds."""

    clients: int
    seconds: float = 0.0
    tokens: int = 0
    """Of the answers, as `usage` says."""
    first: list[float] = field(default_factory=list)
    """From sending a request to the first text of its answer."""
    gaps: list[float] = field(default_factory=list)
    """Between two pieces of one answer."""
    client_cpu: float = 0.0
    """CPU time of this process."""

    @property
    def throughput(self) -> float:
        """Tokens a second of all clients together."""
        return self.tokens / self.seconds

    def figures(self) -> dict[str, float]:
        """Throughput in tokens a second, times in milliseconds."""
        return {
            "tokens_per_s": self.throughput,
            "first_ms": 1e3 * median(self.first),
            "first_p95_ms": 1e3 * percentile(self.first, 0.95),
            "gap_ms": 1e3 * median(self.gaps),
            "gap_p95_ms": 1e3 * percentile(self.gaps, 0.95),
            "client_cpu_share": self.client_cpu / self.seconds,
        }

    def json(self) -> dict[str, object]:
        """Everything, for a file."""
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of all are (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def run(
    port: int,
    model: str,
    clients: int,
    answers: int,
    *,
    prompt: int = 64,
    new: int = 64,
    spread: float = 0.0,
    seed: int = 0,
) -> Load:
    """Let `clients` at once take `answers` answers each from the server at `port`.

    Args:
        port: of 127.0.0.1.
        model: what the server calls the model.
        clients: how many at once.
        answers: of each client.
        prompt: words of a prompt, each one token; no two prompts begin alike, so that none is found in a cache.
        new: tokens of an answer.
        spread: an answer has `new * (1 - spread)` to `new * (1 + spread)` tokens, all equally likely.
        seed: of the prompts.

    Raises:
        RuntimeError: an answer was refused or broke off.
    """
    load = Load(clients)
    words = random.Random(seed)
    prompts = [[_text(words, prompt) for _ in range(answers)] for _ in range(clients)]

    async def client(mine: list[str]) -> None:
        for text in mine:
            length = round(new * words.uniform(1 - spread, 1 + spread))
            body = {"model": model, "prompt": text, "max_tokens": length, "temperature": 0, "stream": True}
            await _answer(port, json.dumps(body).encode(), load)
            load.tokens += length

    async def everybody() -> None:
        await asyncio.gather(*map(client, prompts))

    start, cpu = time.perf_counter(), time.process_time()
    _run(everybody())
    load.seconds, load.client_cpu = time.perf_counter() - start, time.process_time() - cpu
    return load


def run_with_long_prompt(
    port: int, model: str, clients: int, *, prompt: int = 1500, seed: int = 0
) -> tuple[Load, Load]:
    """Streams that are in progress, and a request with a long prompt that comes into them.

    Args:
        port, model, seed: as those of `run`.
        clients: streams; each is 192 tokens long.
        prompt: words of the long prompt.

    Returns:
        what the streams saw from the arrival of the long prompt to its first token, and what the other one saw.
    """
    words = random.Random(seed)
    streams, other = Load(clients), Load(1)

    def body(length: int, new: int) -> bytes:
        text = _text(words, length)
        return json.dumps(
            {"model": model, "prompt": text, "max_tokens": new, "temperature": 0, "stream": True}
        ).encode()

    async def long() -> None:
        while len(streams.first) < clients:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        streams.gaps.clear()
        watched = asyncio.ensure_future(_answer(port, body(prompt, 2), other))
        while not other.first and not watched.done():
            await asyncio.sleep(0.001)
        kept.extend(streams.gaps)
        await watched

    kept: list[float] = []

    async def everybody() -> None:
        await asyncio.gather(long(), *(_answer(port, body(64, 192), streams) for _ in range(clients)))

    _run(everybody())
    streams.gaps = kept
    return streams, other


def _text(words: random.Random, count: int) -> str:
    return " ".join(f"w{words.randrange(3, 32000)}" for _ in range(count))


class _Answer(asyncio.Protocol):
    """One request on a connection of its own, read to its end."""

    def __init__(self, request: bytes, load: Load) -> None:
        self._request, self._load = request, load
        self._rest = b""
        self._last = 0.0
        self._finished = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        """Ask."""
        self._sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """A piece of the answer, which begins with its status."""
        now = time.perf_counter()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if b'"text":""' in event or b"data: {" not in event:
                self._finished = self._finished or b'"length"' in event
            elif b'"error"' in event:
                self._fail(event)
            else:
                self._finished = self._finished or b'"length"' in event
                if self._last:
                    self._load.gaps.append(now - self._last)
                else:
                    self._load.first.append(now - self._sent)
                self._last = now

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has closed it."""
        if not self.ended.done():
            if self._finished:
                self.ended.set_result(None)
            else:
                self._fail(self._rest or b"an answer ended before its last token")

    def _fail(self, what: bytes) -> None:
        if not self.ended.done():
            self.ended.set_exception(RuntimeError(what.decode()))


async def _answer(port: int, body: bytes, load: Load) -> None:
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    _, answer = await loop.create_connection(lambda: _Answer(head.encode() + body, load), "127.0.0.1", port)
    await answer.ended


def new_loop() -> asyncio.AbstractEventLoop:
    """The quickest event loop that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work)
