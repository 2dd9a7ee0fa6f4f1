"""An hour of mixed load on a server of three bundles: does it hold more and more memory, files or threads?

    .venv/bin/python tests/serve/load/hour.py [--seconds 3600] [--share 0.15] [--csv FILE]

Streams, whole answers, clients that leave, illegal bodies, long prompts, structured output, embeddings; new
connections and old ones. The load takes about `--share` of all cores. Every ten seconds the traffic pauses until
nothing is under way, and memory, open files and threads of the server are read: what is left then belongs to nobody.
Before the load each shape of a call is asked for once. The first sixth is warm-up. Of the rest a line is fitted; its
slope's interval allows for samples that depend on their neighbours (Newey and West's variance). Exit code 1: more
memory with certainty (the whole interval above zero, and more than 1 % an hour), more files or threads, or an answer
that was not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import csv
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from processes import ServerProcess, Use, export_bundles, serving

from doge_deploy.serve.http.rest import REST_SECONDS
from doge_deploy.serve.scheduler import Limits

EVERY_SECONDS = 10.0
SLOTS, LENGTH, TOGETHER = 4, 512, Limits().together_tokens
"""Of the server: slots, the longest text of doge-tiny, and tokens of several prompts in one call."""
REST = 2 * REST_SECONDS
"""Whoever left is noticed, closed connections are closed, and the engines have given back what they do not use."""
CONFIDENCE = 1.96
WORDS = "list of a the for in def return x + = value dog cat once upon time print range len i ( ) :\n".split(" ")

BAD = (
    '{"prompt": "a"',
    '{"prompt": "a", "temperature": NaN}',
    '{"prompt": [' + '"",' * 100_000 + '""]}',
    '{"prompt": "a", "unknown": 1}',
    '{"prompt": [5], "max_tokens": -1}',
    '{"prompt": [99999999]}',
    '{"prompt": "a", "guided_regex": "("}',
    "[" * 50_000,
    '{"prompt": "\\ud800"}',
)


@dataclass
class Tally:
    """What was asked and what came back."""

    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)
    """The first answer to each request that has a seed."""
    other: int = 0
    """Answers that were not the first one."""
    again: int = 0

    def expect(self, right: bool, what: str) -> None:
        """Note it where it is not right."""
        if not right:
            self.wrong.append(what[:300])

    def same(self, key: str, text: str) -> None:
        """Compare with the first answer to the same request."""
        if key in self.first:
            self.again += 1
            self.other += self.first[key] != text
        else:
            self.first[key] = text


class Traffic:
    """Draws requests and sends them."""

    def __init__(self, client: httpx.AsyncClient, url: str, seed: int) -> None:
        self.client, self.url, self.random, self.tally = client, url, random.Random(seed), Tally()
        self.kinds = {
            self.stream: 30,
            self.whole: 25,
            self.leave: 12,
            self.bad: 10,
            self.long: 8,
            self.guided: 5,
            self.embed: 5,
            self.look: 5,
        }

    async def one(self) -> None:
        """One request."""
        kind = self.random.choices([*self.kinds], [*self.kinds.values()])[0]
        self.tally.kinds[kind.__name__] += 1
        try:
            await kind()
        except (httpx.HTTPError, KeyError, ValueError) as error:
            self.tally.wrong.append(f"{kind.__name__}: {error!r}"[:300])

    def _words(self, number: int) -> str:
        return " ".join(self.random.choices(WORDS, k=number))

    def _body(self, prompt: str) -> tuple[str, dict[str, Any]]:
        # few different ones, so that most come again
        seed = self.random.randrange(40)
        chosen = random.Random(seed)
        options: dict[str, Any] = {"model": chosen.choice(("fp32", "int8")), "max_tokens": chosen.randrange(1, 60)}
        options |= {"temperature": 0} if chosen.random() < 0.4 else {"temperature": 0.9, "seed": seed}
        if chosen.random() < 0.3:
            options["stop"] = [" x", "the"]
        text = prompt or " ".join(chosen.choices(WORDS, k=chosen.randrange(1, 60)))
        if chosen.random() < 0.5:
            return "/v1/completions", {"prompt": text, **options}
        messages = [{"role": "system", "content": "You are short."}, {"role": "user", "content": text}]
        return "/v1/chat/completions", {"messages": messages, **options}

    async def stream(self) -> None:
        path, body = self._body("")
        text, ended = "", False
        async with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line:
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        self.tally.expect(ended and response.status_code == 200, f"stream: {response.status_code} {text}")
        self.tally.same(json.dumps([path, body]), text)

    async def whole(self) -> None:
        path, body = self._body("")
        response = await self.client.post(path, json=body)
        (choice,) = response.json()["choices"]
        self.tally.same(json.dumps([path, body]), choice["text"] if "text" in choice else choice["message"]["content"])

    async def long(self) -> None:
        path, body = self._body(self._words(self.random.randrange(100, 130)))
        response = await self.client.post(path, json=body)
        self.tally.expect(response.status_code in (200, 400), f"long: {response.text}")

    async def leave(self) -> None:
        path, body = self._body(self._words(self.random.randrange(1, 120)))
        body |= {"max_tokens": 300, "stream": self.random.random() < 0.5}
        asked = asyncio.ensure_future(self._read(path, body))
        await asyncio.wait((asked,), timeout=self.random.random() ** 3 * 0.5)
        asked.cancel()
        await asyncio.wait((asked,))

    async def _read(self, path: str, body: dict[str, Any]) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            await client.post(path, json=body)

    async def bad(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            body = self.random.choice(BAD)
            response = await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        self.tally.expect(400 <= response.status_code < 500, f"bad: {response.status_code} {response.text}")

    async def guided(self) -> None:
        seed = self.random.randrange(20)
        body = {"prompt": "x", "model": "fp32", "max_tokens": 40, "temperature": 1, "seed": seed}
        pattern = f"[0-9]{{{1 + seed % 5}}}-(yes|no)"
        response = await self.client.post("/v1/completions", json={**body, "guided_regex": pattern, "n": 2})
        for choice in response.json()["choices"]:
            self.tally.expect(choice["text"].endswith(("-yes", "-no")), f"guided: {choice}")

    async def embed(self) -> None:
        texts = [self._words(self.random.randrange(1, 80)) for _ in range(self.random.randrange(1, 6))]
        body = {"input": texts, "model": "features", "encoding_format": "base64"}
        rows = (await self.client.post("/v1/embeddings", json=body)).json()["data"]
        for row in rows:
            length = np.linalg.norm(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"))
            self.tally.expect(abs(length - 1) < 1e-4, f"embed: length {length}")

    async def look(self) -> None:
        for path in ("/metrics", "/v1/models", "/ready", "/"):
            response = await self.client.get(path)
            self.tally.expect(response.status_code == 200, f"look: {path} {response.status_code}")
        response = await self.client.post("/tokenize", json={"prompt": self._words(50), "model": "int8"})
        self.tally.expect(response.json()["count"] > 0, f"tokenize: {response.text}")


async def every_shape(client: httpx.AsyncClient) -> int:
    """Each number of rows with each length once, and how many requests that were.

    ONNX Runtime keeps a plan of where results lie for every shape of a call that it has seen. Shapes are limited, but
    chance brings the last of them after hours only.
    """
    chosen, asked = random.Random(0), 0
    for model in ("fp32", "int8"):
        for rows in range(1, SLOTS + 1):
            for length in range(1, LENGTH if rows == 1 else TOGETHER):
                # none begins as another does: what a slot holds is not computed again
                prompts = [[chosen.randrange(8, 1000)] * (length if row == 0 else 1) for row in range(rows)]
                body = {"model": model, "prompt": prompts, "max_tokens": 1}
                (await client.post("/v1/completions", json=body)).raise_for_status()
                asked += 1
    for length in range(1, LENGTH):
        body = {"model": "features", "input": [chosen.randrange(8, 1000)] * length}
        (await client.post("/v1/embeddings", json=body)).raise_for_status()
        asked += 1
    return asked


async def load(server: ServerProcess, seconds: float, share: float, out: Path, seed: int) -> tuple[list[Use], Tally]:
    """Send traffic; samples at rest, one every `EVERY_SECONDS`."""
    samples: list[Use] = []
    limits = httpx.Limits(max_keepalive_connections=4)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        print(f"{await every_shape(client)} requests, one of each shape, before the load", flush=True)
        traffic = Traffic(client, server.url, seed)
        start = time.monotonic()
        rate = 2.0
        with out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["seconds", *asdict(server.use()), "requests", "rate"])
            while (begun := time.monotonic()) < start + seconds:
                used = server.use().cpu_seconds + time.process_time()
                running: set[asyncio.Task[None]] = set()
                while time.monotonic() < begun + EVERY_SECONDS:
                    if len(running) < 32:
                        running.add(task := asyncio.ensure_future(traffic.one()))
                        task.add_done_callback(running.discard)
                    await asyncio.sleep(traffic.random.expovariate(rate))
                if running:
                    await asyncio.wait(running)
                await asyncio.sleep(REST)
                samples.append(server.use())
                elapsed = time.monotonic() - begun
                taken = (samples[-1].cpu_seconds + time.process_time() - used) / elapsed / (os.cpu_count() or 1)
                rate = min(max(rate * min(max(share / max(taken, 1e-3), 0.5), 2.0), 0.2), 50.0)
                total = sum(traffic.tally.kinds.values())
                row = [round(time.monotonic() - start, 1), *asdict(samples[-1]).values(), total, round(rate, 2)]
                writer.writerow(row)
                file.flush()
    return samples, traffic.tally


def slope(times: np.ndarray[Any, Any], values: np.ndarray[Any, Any], lags: int = 30) -> tuple[float, float]:
    """Of a fitted line, and half its 95 % interval; `lags` neighbours on each side may depend on each other."""
    centred = times - times.mean()
    fitted = float(centred @ values / (centred @ centred))
    scores = centred * (values - values.mean() - fitted * centred)
    variance = scores @ scores
    for lag in range(1, min(lags, len(scores) - 1) + 1):
        variance += 2 * (1 - lag / (lags + 1)) * (scores[lag:] @ scores[:-lag])
    return fitted, CONFIDENCE * float(np.sqrt(max(variance, 0.0))) / float(centred @ centred)


def judge(seconds: np.ndarray[Any, Any], samples: list[Use], tally: Tally) -> bool:
    """Print what was found; whether all of it is as it must be."""
    kept = seconds >= seconds[0] + (seconds[-1] - seconds[0]) / 6
    hours = seconds[kept] / 3600
    good = not tally.wrong
    print(f"{sum(tally.kinds.values())} requests: {dict(tally.kinds)}")
    print(f"{len(tally.wrong)} answers were not as they must be {tally.wrong[:5]}")
    print(f"{tally.again} requests came again; {tally.other} of their texts were another than the first time")
    print(f"{len(seconds)} samples in {seconds[-1]:.0f} s; the first sixth is left out below")
    for name in ("memory_mib", "files", "threads"):
        values = np.array([getattr(sample, name) for sample in samples], float)[kept]
        rise, half = slope(hours, values)
        low, high = rise - half, rise + half
        limit = 0.01 * values.mean() if name == "memory_mib" else 0.5
        grows = low > 0 and rise > limit
        good &= not grows
        print(
            f"{name}: {values[0]:.1f} first, {values[-1]:.1f} last, {values.min():.1f} to {values.max():.1f};"
            f" slope {rise:+.3f} an hour, 95 % {low:+.3f} to {high:+.3f}{': GROWS' if grows else ''}"
        )
    return good


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--share", type=float, default=0.15, help="of all cores, server and clients together")
    parser.add_argument("--bundles", type=Path, help="where bundles are or go; a temporary folder where not given")
    parser.add_argument("--csv", type=Path, default=Path("hour.csv"), help="the samples")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.nice(15)
    folder = options.bundles or Path(tempfile.mkdtemp())
    bundles = export_bundles(folder, ("fp32", "int8", "features"))
    names = [argument for name in bundles for argument in ("--served-model-name", name)]
    with serving([*bundles.values()], "--slots", str(SLOTS), *names) as server:
        samples, tally = asyncio.run(load(server, options.seconds, options.share, options.csv, options.seed))
    with options.csv.open() as file:
        seconds = np.array([float(row["seconds"]) for row in csv.DictReader(file)])
    return 0 if judge(seconds, samples, tally) else 1


if __name__ == "__main__":
    sys.exit(main())
