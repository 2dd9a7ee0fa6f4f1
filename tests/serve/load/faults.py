"""Clients that misbehave in great numbers, and signals, on a server that has work to do meanwhile.

    .venv/bin/python tests/serve/load/faults.py [NAME ...]

Beside each kind of trouble four witnesses ask for the same texts again and again, token by token as a stream; what they
get must be what they got before, and nobody may wait for ever. Printed are memory, open files and threads of the server
before, at the peak and after. Kinds: vanish (500 clients that leave at random moments), burst (1,000 requests at once),
bodies (large ones, 200 at once), stuck (clients that do not read, do not send, or send a byte a second), killed (a
client that gets SIGKILL) and sigterm. Exit code 1: something was not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from processes import ServerProcess, export_bundles, forget_peak, serving

WITNESSES = ("Once upon a time", "def f(x):", "A list is", "The dog")
ENDLESS = {"1": -100, "5": -100}
"""Biases with which a text does not end by itself."""
PATIENCE_SECONDS = 60
KEPT_MIB = 80.0
"""Memory that trouble may leave behind: 1,000 connections at once leave 40 MiB and clients that do not read 68, and the
next ones add nothing. (200 large bodies would leave 120 if nothing were given back.)
"""


class Trouble(Exception):
    """Something was not as it must be."""


def require(right: bool, what: str) -> None:
    """Raises Trouble where it is not right."""
    if not right:
        raise Trouble(what)


async def tokens_of(client: httpx.AsyncClient, prompt: str) -> list[str]:
    """A greedy stream, token by token. Short enough that no key is dropped, so that it cannot be a near-tie."""
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "logprobs": 0, "stream": True, "logit_bias": ENDLESS}
    while True:
        found: list[str] = []
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                await asyncio.sleep(0.2)
                continue
            require(response.status_code == 200, f"a witness got {response.status_code}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    require("error" not in event, f"a witness got {event}")
                    found += (event["choices"][0]["logprobs"] or {}).get("tokens", [])
        return found


@contextlib.asynccontextmanager
async def witnesses(url: str) -> AsyncIterator[collections.Counter[str]]:
    """Ask all the time until the block ends; counts what was asked."""
    count: collections.Counter[str] = collections.Counter()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        expected = {prompt: await tokens_of(client, prompt) for prompt in WITNESSES}

        async def ask(prompt: str) -> None:
            while True:
                found = await tokens_of(client, prompt)
                require(found == expected[prompt], f"{prompt!r} became {found}, not {expected[prompt]}")
                count[prompt] += 1

        tasks = [asyncio.ensure_future(ask(prompt)) for prompt in WITNESSES]
        try:
            yield count
        finally:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome


def request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """As bytes of a connection."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def metrics(url: str) -> dict[str, float]:
    """The gauges and counters without their labels, summed."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    found: dict[str, float] = collections.defaultdict(float)
    for line in lines:
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found["cancelled" if '"cancelled"' in name else name.split("{")[0]] += float(value)
    return found


async def cancelled(server: ServerProcess) -> float:
    """Texts that ended because their client was gone."""
    return (await metrics(server.url))["cancelled"]


async def until(server: ServerProcess, reached: Callable[[float], bool], what: str, seconds: float = 60) -> None:
    """Wait until the number of requests that run or wait is as `reached` says."""
    deadline = time.monotonic() + seconds
    while True:
        found = await metrics(server.url)
        if reached(found["doge_num_requests_running"] + found["doge_num_requests_waiting"]):
            return
        require(time.monotonic() < deadline, f"{what}: {dict(found)}")
        await asyncio.sleep(0.1)


async def at_rest(server: ServerProcess) -> None:
    """Wait until nothing runs and nothing waits."""
    await until(server, lambda requests: not requests, "it does not come to rest")


async def vanish(server: ServerProcess, clients: int = 500) -> str:
    """Clients that leave at random moments: in the middle of their request, queued, in prefill, in decode."""
    chosen = random.Random(1)
    limit = asyncio.Semaphore(24)

    async def one(number: int) -> None:
        body = {"prompt": [6 + number % 900] * chosen.choice((2, 100, 400)), "max_tokens": 100, "logit_bias": ENDLESS}
        data = request({**body, "stream": chosen.random() < 0.5})
        async with limit:
            reader, writer = await asyncio.open_connection(*server.address)
            sent = len(data) if chosen.random() < 0.9 else chosen.randrange(1, len(data))
            writer.write(data[:sent])
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1 if chosen.random() < 0.3 else -1), chosen.random() ** 2 * 1.5)
            if chosen.random() < 0.5:  # without a farewell: the system sends a reset
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    before = await cancelled(server)
    await asyncio.gather(*(one(number) for number in range(clients)))
    return f"{clients} clients left; {await cancelled(server) - before:.0f} of their texts were cut short"


async def burst(server: ServerProcess, requests: int = 1000) -> str:
    """All at once: each is answered or refused."""
    limits = httpx.Limits(max_connections=requests)
    start = time.monotonic()
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        body = {"max_tokens": 8, "logit_bias": ENDLESS}
        answers = await asyncio.gather(
            *(
                client.post("/v1/completions", json={**body, "prompt": [7 + n % 900] * (n % 90 + 1)})
                for n in range(requests)
            )
        )
    counts = collections.Counter(answer.status_code for answer in answers)
    require(set(counts) <= {200, 429} and counts[200] >= 256, f"answers: {counts}")
    require(all(a.headers["retry-after"] for a in answers if a.status_code == 429), "429 without Retry-After")
    whole = all(a.json()["usage"]["completion_tokens"] == 8 for a in answers if a.status_code == 200)
    require(whole, "an answer was not whole")
    return f"{requests} at once in {time.monotonic() - start:.1f} s: {dict(counts)}"


async def bodies(server: ServerProcess, requests: int = 200, size: int = 400_000) -> str:
    """Large bodies all at once, three times: what they took goes back to the system."""
    counts: collections.Counter[int] = collections.Counter()
    body = {"prompt": [7] * 60, "max_tokens": 8, "user": "x" * size}
    limits = httpx.Limits(max_connections=requests)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        for _ in range(3):
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(requests)))
            counts.update(answer.status_code for answer in answers)
    require(set(counts) <= {200, 429}, f"answers: {counts}")
    return f"three times {requests} bodies of {size / 1000:.0f} kB: {dict(counts)}"


def clients_of(port: int) -> set[tuple[str, int]]:
    """Addresses of clients that the server's side of the system has connections with.

    Those of the clients say nothing: the reset of a connection whose window is full may lie outside of that window,
    where a client's system takes no notice of it (RFC 5961, section 3.2).
    """
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        address, number = remote.split(":")
        if int(local.split(":")[1], 16) == port and state == "01":
            found.add((socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(number, 16)))
    return found


async def stuck(server: ServerProcess, each: int = 20) -> str:
    """Clients that do not read, say nothing, stop within a request, or send a byte a second: all are closed in time."""
    wide = {"prompt": [7], "max_tokens": 400, "n": 4, "logprobs": 20, "logit_bias": ENDLESS, "stream": True}
    loop = asyncio.get_running_loop()

    async def closed(begun: bytes, trickle: bool, reads: bool) -> float:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await loop.sock_connect(connection, server.address)
        await loop.sock_sendall(connection, begun)
        start = time.monotonic()
        with connection, contextlib.suppress(OSError):
            while time.monotonic() < start + 8 * PATIENCE_SECONDS:
                if not reads:
                    await asyncio.sleep(1)
                    if connection.getsockname() not in clients_of(server.address[1]):
                        break
                    continue
                if trickle:
                    await loop.sock_sendall(connection, b"a")
                with contextlib.suppress(TimeoutError):
                    if not await asyncio.wait_for(loop.sock_recv(connection, 4096), 1):
                        break
        return time.monotonic() - start

    kinds = {
        "unread": (request(wide), False, False),
        "silent": (b"", False, True),
        "begun": (request(wide)[:200], False, True),
        "byte a second": (b"GET /health HTTP/1.1\r\nX-Slow: ", True, True),
    }
    jobs = {name: [closed(*kind) for _ in range(each)] for name, kind in kinds.items()}
    found = await asyncio.gather(*(asyncio.gather(*job) for job in jobs.values()))
    longest = {name: max(times) for name, times in zip(jobs, found, strict=True)}
    # texts that are not read are made first, one after another
    limits = {name: (8 if name == "unread" else 3) * PATIENCE_SECONDS for name in longest}
    require(all(longest[name] < limits[name] for name in longest), f"not closed in time: {longest}")
    return f"{each} of each kind; closed after at most { ({name: round(t) for name, t in longest.items()}) } s"


async def killed(server: ServerProcess) -> str:
    """A client that gets SIGKILL in the middle of its stream: its slot is free."""
    body = {"prompt": "x", "max_tokens": 470, "stream": True, "logit_bias": ENDLESS}
    script = (
        "import httpx, sys\n"
        f"with httpx.stream('POST', {server.url + '/v1/completions'!r}, json={body!r}, timeout=60) as response:\n"
        "    for line in response.iter_lines():\n"
        "        print(line, flush=True)\n"
    )
    before = await cancelled(server)
    for _ in range(5):
        client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert client.stdout is not None
        await asyncio.to_thread(client.stdout.readline)
        client.kill()
        client.wait()
        client.stdout.close()
    return f"5 clients killed; {await cancelled(server) - before:.0f} of their texts were cut short"


def sigterm(bundle: Path) -> str:
    """SIGTERM under load: what runs ends or is told why not, what is new is refused, and the code is 0."""
    with serving([bundle], "--slots", "4", "--drain-seconds", "3") as server:

        async def one(client: httpx.AsyncClient, number: int) -> str:
            body = {"prompt": [7 + number], "max_tokens": 20 if number % 2 else 480, "stream": number % 3 > 0}
            response = await client.post("/v1/completions", json={**body, "logit_bias": ENDLESS})
            if response.status_code != 200:
                return f"{response.status_code} {response.json()['error']['code']}"
            if not body["stream"]:
                return "whole" if response.json()["choices"][0]["finish_reason"] == "length" else "?"
            last = [line for line in response.text.split("\n\n") if line]
            require(last[-1] == "data: [DONE]", f"a stream ended with {last[-1]}")
            return "error event" if "error" in last[-2] else "whole stream"

        async def load() -> tuple[collections.Counter[str], float]:
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
                jobs = [asyncio.ensure_future(one(client, number)) for number in range(120)]
                await until(server, lambda requests: requests >= 60, "the load does not arrive")
                start = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.2)
                jobs += [asyncio.ensure_future(one(client, number)) for number in range(5)]
                counts = collections.Counter(await asyncio.gather(*jobs))
                await asyncio.to_thread(server.process.wait, 30)
                return counts, time.monotonic() - start

        counts, seconds = asyncio.run(load())
        require(counts["503 shutting_down"] >= 5 and "?" not in counts, f"answers: {counts}")
        require(server.process.returncode == 0, f"it ended with {server.process.returncode}")
        return f"ended with code 0 after {seconds:.1f} s (--drain-seconds 3): {dict(counts)}"


KINDS: dict[str, Callable[[ServerProcess], Awaitable[str]]] = {
    "vanish": vanish,
    "burst": burst,
    "bodies": bodies,
    "stuck": stuck,
    "killed": killed,
}


async def watch(server: ServerProcess, kind: Callable[[ServerProcess], Awaitable[str]]) -> str:
    """Run one kind of trouble beside the witnesses."""
    async with witnesses(server.url) as warm:
        while len(warm) < len(WITNESSES):
            await asyncio.sleep(0.05)
    await at_rest(server)
    await asyncio.sleep(0.5)
    before = server.use()
    forget_peak(server.process.pid)
    async with witnesses(server.url) as count:
        told = await asyncio.wait_for(kind(server), 550)
    await at_rest(server)
    await asyncio.sleep(1.0)
    after = server.use()
    require(after.memory_mib <= before.memory_mib + KEPT_MIB, f"memory stays: {before} {after}")
    require(after.files <= before.files and after.threads <= before.threads + 2, f"left behind: {before} {after}")
    return (
        f"{told}; witnesses got {count.total()} streams, all as before; MiB {before.memory_mib:.0f} before,"
        f" {after.peak_mib:.0f} peak, {after.memory_mib:.0f} after; files {before.files} and {after.files};"
        f" threads {before.threads} and {after.threads}"
    )


def main() -> int:
    """Run them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(KINDS)}, sigterm; all where none is")
    parser.add_argument("--bundles", type=Path, help="where bundles are or go; a temporary folder where not given")
    options = parser.parse_args()
    bundle = export_bundles(options.bundles or Path(tempfile.mkdtemp()), ("fp32",))["fp32"]
    wrong = 0
    for name in options.names or [*KINDS, "sigterm"]:
        try:
            if name == "sigterm":
                told = sigterm(bundle)
            else:
                with serving([bundle], "--slots", "4") as server:
                    told = asyncio.run(watch(server, KINDS[name]))
                    noise = [line for line in server.log.read_text().splitlines() if " request " not in line][1:]
                    require(not noise, f"the log has {noise[:3]}")
        except (Trouble, httpx.HTTPError, TimeoutError) as error:
            wrong += 1
            told = f"WRONG: {error!r}"
        print(f"{name}: {told}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
