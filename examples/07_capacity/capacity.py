"""Capacity, predicted: the server's own scheduler under a clock that is not real.

python capacity.py costs BENCH.json... > costs.json     what steps cost, from `doge-deploy bench --json`
python capacity.py predict costs.json                   throughput and latency for some clients
python capacity.py compare costs.json SPEED.json KIND   the same, beside what examples/06_serve_speed measured
python capacity.py users costs.json --users 10000       how many replicas they need

Axes: V tokens of a vocabulary that is as small as it can be: no model runs.
"""

from __future__ import annotations

import heapq
import json
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from doge_deploy.options.generation import SamplingOptions
from doge_deploy.runtime.logits import HostLogits
from doge_deploy.runtime.sampling import Sampler
from doge_deploy.serve.request import Event, Finished, Produced, Request
from doge_deploy.serve.scheduler import Limits, Scheduler

TOKEN, LOGITS = 1, np.array([0.0, 1.0], np.float32)


@dataclass(frozen=True)
class Costs:
    """Seconds of the calls of a model, and of what a server adds to them."""

    decode: dict[int, float]
    """One token for each of so many rows."""
    prefill: dict[int, float]
    """So many tokens of one row."""
    token: float = 0.0
    """To choose a token and to send it."""
    request: float = 0.0
    """To take a request in."""

    def of_decode(self, rows: int) -> float:
        """Between two measured numbers of rows the cost lies on the line between them."""
        return _between(self.decode, rows) + rows * self.token

    def of_prefill(self, tokens: int) -> float:
        """The same by tokens; those of several rows take as long as so many of one, padding included."""
        return _between(self.prefill, tokens)

    @classmethod
    def load(cls, path: Path) -> Costs:
        """Written by `costs`."""
        read = json.loads(path.read_text())
        tables = {name: {int(key): value for key, value in read[name].items()} for name in ("decode", "prefill")}
        return cls(**tables, token=read["token"], request=read["request"])


def _between(table: dict[int, float], wanted: int) -> float:
    known = sorted(table)
    if len(known) == 1:
        return table[known[0]] * wanted / known[0]
    place = min(max(bisect_left(known, wanted), 1), len(known) - 1)
    low, high = known[place - 1], known[place]
    slope = (table[high] - table[low]) / (high - low)
    return table[low] + max(slope, 0.0) * (wanted - low)


class Clock:
    """Time of one replica, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0


class PaperSlots:
    """Rows that hold nothing but a count; a call moves the clock on by what it costs."""

    all_logits = whole_prompts = False

    def __init__(self, slots: int, max_length: int, costs: Costs, clock: Clock) -> None:
        self.slots, self.max_length = slots, max_length
        self._costs, self._clock = costs, clock
        self._next = iter(range(slots))

    def acquire(self) -> int:
        """The next slot."""
        return next(self._next)

    def prefill(self, slot: int, ids: Sequence[int]) -> HostLogits:
        """A piece of a prompt."""
        self._clock.now += self._costs.of_prefill(len(ids))
        return HostLogits(LOGITS[None, None])

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> HostLogits:
        """A token for each of some rows."""
        self._clock.now += self._costs.of_decode(len(slots))
        return HostLogits(np.broadcast_to(LOGITS, (len(slots), 1, len(LOGITS))))

    def extend(self, slots: Sequence[int], ids: Sequence[Sequence[int]], last: int = 1) -> HostLogits:
        """Prompts that are fed together; nothing is guessed or scored here."""
        assert last == 1
        self._clock.now += self._costs.of_prefill(len(slots) * max(map(len, ids)))
        return HostLogits(np.broadcast_to(LOGITS, (len(slots), 1, len(LOGITS))))

    def joins(self, lengths: Sequence[int]) -> bool:
        """Always."""
        return True

    def copy(self, source: int, target: int, tokens: int) -> None:
        """No two prompts begin alike."""
        raise AssertionError

    def truncate(self, slot: int, tokens: int) -> None:
        """There is nothing to forget."""

    def can_cut(self, slot: int) -> bool:
        """Always."""
        return True


class NoText:
    """Tokens are not turned into text."""

    stopped = False

    def push(self, token: int) -> str:
        """No text."""
        return ""

    def flush(self) -> str:
        """No text."""
        return ""


@dataclass
class Answer:
    """When what happened to a request."""

    asked: float
    user: int
    tokens: list[float] = field(default_factory=list)
    """Times of its tokens."""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.asked


@dataclass
class Seen:
    """What all clients saw."""

    answers: list[Answer] = field(default_factory=list)

    def after(self, warm: float) -> Seen:
        """Those asked for after the beginning, in which nobody waits yet."""
        return Seen([answer for answer in self.answers if answer.asked >= warm])

    def figures(self) -> dict[str, float]:
        """Tokens a second, and milliseconds."""
        first = sorted(answer.first for answer in self.answers)
        gaps = [b - a for answer in self.answers for a, b in zip(answer.tokens, answer.tokens[1:], strict=False)]
        begin, end = min(a.asked for a in self.answers), max(a.tokens[-1] for a in self.answers)
        return {
            "tokens_per_s": sum(len(answer.tokens) for answer in self.answers) / (end - begin),
            "first_ms": 1e3 * median(first),
            "first_p95_ms": 1e3 * first[min(int(0.95 * len(first)), len(first) - 1)],
            "gap_ms": 1e3 * median(gaps),
            "gap_p95_ms": 1e3 * float(np.quantile(gaps, 0.95)),
        }


class Replica:
    """One server: a scheduler, its rows and its clock."""

    def __init__(self, costs: Costs, slots: int, limits: Limits, done: Callable[[Replica, Answer], None]) -> None:
        self.clock = Clock()
        self._costs, self._done = costs, done
        self._scheduler = Scheduler(PaperSlots(slots, 1 << 30, costs, self.clock), limits)
        self._inbox: list[tuple[float, int, Answer, int, int]] = []
        self._front = 0.0
        """When the last request has been taken in: they are taken in one after the other."""
        self._count = self.open = 0
        """Requests so far; those that have not ended."""

    def ask(self, answer: Answer, at: float, prompt: int, new: int) -> None:
        """A request arrives at a time that has not been reached yet, or at once."""
        self.open += 1
        self._count += 1
        self._front = max(self._front, at) + self._costs.request
        heapq.heappush(self._inbox, (self._front, self._count, answer, prompt, new))

    @property
    def next_event(self) -> float:
        """When it does something next; infinity where it waits for a request."""
        if not self._scheduler.idle:
            return self.clock.now
        return max(self._inbox[0][0], self.clock.now) if self._inbox else float("inf")

    def step(self) -> None:
        """Make one step, and take in what has arrived before each half of it, as the server does."""
        if self._scheduler.idle:
            self.clock.now = self.next_event
        for half in (self._scheduler.make_tokens, self._scheduler.feed_prompts):
            while self._inbox and self._inbox[0][0] <= self.clock.now:
                _, number, answer, prompt, new = heapq.heappop(self._inbox)
                self._submit(number, answer, prompt, new)
            half()

    def _submit(self, number: int, answer: Answer, prompt: int, new: int) -> None:
        def send(event: Event) -> None:
            if isinstance(event, Produced):
                answer.tokens.append(self.clock.now)
            elif isinstance(event, Finished):
                self.open -= 1
                self._done(self, answer)

        ids = range(number << 20, (number << 20) + prompt)  # no two prompts begin alike
        self._scheduler.submit(Request(str(number), ids, Sampler(SamplingOptions()), new, send, NoText()))


@dataclass(frozen=True)
class Workload:
    """What clients ask for."""

    prompt: int = 64
    new: int = 64
    pause: float = 0.0
    """Mean seconds between an answer and the next request of a user, exponentially distributed; 0 for none."""
    spread: float = 0.0
    """An answer has `new * (1 - spread)` to `new * (1 + spread)` tokens, all equally likely."""


def simulate(costs: Costs, users: int, replicas: int, seconds: float, load: Workload, slots: int, seed: int) -> Seen:
    """Users that ask again and again, each time at the replica with the fewest open requests.

    Args:
        costs: of a step.
        users: how many.
        replicas: R servers.
        seconds: no request begins later.
        load: what they ask for.
        slots: of each replica.
        seed: of pauses and lengths.
    """
    dice, seen = random.Random(seed), Seen()
    arrivals: list[tuple[float, int]] = []

    def pause() -> float:
        return dice.expovariate(1 / load.pause) if load.pause else 0.0

    def done(replica: Replica, answer: Answer) -> None:
        heapq.heappush(arrivals, (replica.clock.now + pause(), answer.user))

    limits = Limits(queue_requests=1 << 30, queue_tokens=1 << 60)
    servers = [Replica(costs, slots, limits, done) for _ in range(replicas)]
    for user in range(users):
        heapq.heappush(arrivals, (pause(), user))
    while True:
        server = min(servers, key=lambda one: one.next_event)
        if arrivals and arrivals[0][0] <= server.next_event:
            at, user = heapq.heappop(arrivals)
            if at > seconds:
                continue
            answer = Answer(at, user)
            seen.answers.append(answer)
            new = round(load.new * dice.uniform(1 - load.spread, 1 + load.spread))
            min(servers, key=lambda one: one.open).ask(answer, at, load.prompt, max(new, 1))
        elif server.next_event == float("inf"):
            return seen
        else:
            server.step()


@click.group()
def cli() -> None:
    """Capacity, predicted."""


@cli.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--token-us", default=0.0, help="To choose and send a token, beyond the model.")
@click.option("--request-ms", default=0.0, help="To take a request in.")
def costs(reports: tuple[Path, ...], token_us: float, request_ms: float) -> None:
    """Medians of `doge-deploy bench --json`, of its first candidate."""
    decode: dict[int, float] = {}
    prefill: dict[int, float] = {}
    for path in reports:
        for result in json.loads(path.read_text())["results"]:
            rounds, load = result["measurements"][0]["rounds"], result["workload"]
            rows, tokens = load["batch_size"], load["prompt_length"]
            decode[rows] = median(ns for one in rounds for ns in one["decode_ns"]) / 1e9
            if rows == 1:
                prefill[tokens] = median(ns for one in rounds for ns in one["prefill_ns"]) / 1e9
    written = {"decode": decode, "prefill": prefill, "token": token_us / 1e6, "request": request_ms / 1e3}
    click.echo(json.dumps(written, indent=1))


_SLOTS = click.option("--slots", default=16, show_default=True, help="Of each replica.")
_FILE = click.argument("file", metavar="COSTS", type=click.Path(path_type=Path))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _row(*cells: Any) -> None:
    click.echo("| " + " | ".join(map(str, cells)) + " |")


def _head(*cells: str) -> None:
    _row(*cells)
    _row(*["---"] * len(cells))


@cli.command()
@_FILE
@click.option("--clients", default="1,4,8,16", show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="That pass on paper.")
@click.option("--spread", default=0.0, show_default=True, help="Of the lengths of answers.")
@_SLOTS
def predict(file: Path, clients: str, seconds: float, spread: float, slots: int) -> None:
    """Clients that ask again at once, prompts of 64 tokens, 64 new ones."""
    _head("clients", "tok/s", "first token ms, p95", "gap ms, p95")
    for count in _numbers(clients):
        found = _of_clients(Costs.load(file), count, seconds, slots, spread)
        _row(count, *_cells(found))


def _of_clients(table: Costs, count: int, seconds: float, slots: int, spread: float = 0.0) -> dict[str, float]:
    return simulate(table, count, 1, seconds, Workload(spread=spread), slots, 0).figures()


def _cells(found: dict[str, float]) -> Iterator[str]:
    yield f"{found['tokens_per_s']:.0f}"
    yield f"{found['first_ms']:.1f}, {found['first_p95_ms']:.1f}"
    yield f"{found['gap_ms']:.2f}, {found['gap_p95_ms']:.2f}"


@cli.command()
@_FILE
@click.argument("speed", type=click.Path(path_type=Path))
@click.argument("name")
@_SLOTS
def compare(file: Path, speed: Path, name: str, slots: int) -> None:
    """Beside what NAME (`doge-deploy int8`) did in a file of examples/06_serve_speed."""
    runs = json.loads(speed.read_text())[name]
    _head("clients", "tok/s predicted", "measured", "off by", "first token ms predicted", "measured", "off by")
    for count in dict.fromkeys(one["clients"] for one in runs):
        found = _of_clients(Costs.load(file), count, 4.0, slots)
        mine = [one for one in runs if one["clients"] == count]
        rate = median(one["tokens"] / one["seconds"] for one in mine)
        first = 1e3 * median(value for one in mine for value in one["first"])
        _row(
            count,
            *(f"{found['tokens_per_s']:.0f}", f"{rate:.0f}", f"{found['tokens_per_s'] / rate - 1:+.0%}"),
            *(f"{found['first_ms']:.1f}", f"{first:.1f}", f"{found['first_ms'] / first - 1:+.0%}"),
        )


@cli.command()
@_FILE
@click.option("--users", default=10_000, show_default=True)
@click.option("--pause", default=60.0, show_default=True, help="Mean seconds between an answer and the next question.")
@click.option("--replicas", default="1,2,4,8", show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="That pass on paper; the first third is left out.")
@click.option("--prompt", default=64, show_default=True)
@click.option("--new", default=64, show_default=True)
@_SLOTS
def users(
    file: Path, users: int, pause: float, replicas: str, seconds: float, prompt: int, new: int, slots: int
) -> None:
    """Users that read an answer before they ask again."""
    load = Workload(prompt, new, pause, spread=0.5)
    _head("replicas", "tok/s", "first token ms, p95", "gap ms, p95")
    for count in _numbers(replicas):
        found = simulate(Costs.load(file), users, count, seconds, load, slots, 0).after(seconds / 3)
        _row(count, *_cells(found.figures()))


if __name__ == "__main__":
    cli()
