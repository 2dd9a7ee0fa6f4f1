"""Requests that arrive at the same moment are given to an idle engine together; one alone does not wait for others."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from scripted_slots import ScriptedSlots
from servers import Running, running, scripted

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.serve.http import arrivals as module
from doge_deploy.serve.http.arrivals import ROUNDS, Arrivals


class World:
    """Rounds of an event loop, counted, and when whose wait ended."""

    def __init__(self) -> None:
        self.arrivals, self.round = Arrivals(), 0
        self.ended: dict[str, int] = {}

    async def count(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.round += 1

    async def request(self, name: str, begins: int, takes: int, *, tokens: int = 64, enough: int = 256) -> None:
        """One that is looked at in round `begins` and takes `takes` rounds until it is ready."""
        while self.round < begins:
            await asyncio.sleep(0)
        arrival = self.arrivals.begin()
        for _ in range(takes):
            await asyncio.sleep(0)
        arrival.over()
        await self.arrivals.settled(tokens, enough)
        self.ended[name] = self.round


def play(work: Callable[[World], Awaitable[object]]) -> World:
    async def main() -> World:
        world = World()
        counting = asyncio.ensure_future(world.count())
        await work(world)
        counting.cancel()
        return world

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are counted here, however long a busy machine takes for them."""
    monkeypatch.setattr(module, "LONGEST_SECONDS", 60.0)


def test_one_alone_waits_for_a_few_rounds_and_not_for_time() -> None:
    world = play(lambda world: world.request("a", 0, 3))
    assert ROUNDS <= world.ended["a"] - 3 <= ROUNDS + 3


def test_those_that_come_one_after_the_other_go_together() -> None:
    starts = {"a": 0, "b": 5, "c": 12, "d": 20}
    world = play(lambda world: asyncio.gather(*(world.request(name, at, 4, tokens=8) for name, at in starts.items())))
    assert len(set(world.ended.values())) == 1 and world.ended["a"] >= 24
    assert not world.arrivals.coming


def test_one_that_comes_later_goes_later() -> None:
    world = play(lambda world: asyncio.gather(world.request("a", 0, 0), world.request("b", 3 * ROUNDS, 0)))
    assert world.ended["a"] < 3 * ROUNDS < world.ended["b"]


def test_one_that_is_being_read_is_waited_for() -> None:
    world = play(lambda world: asyncio.gather(world.request("quick", 0, 0), world.request("slow", 2, 60)))
    assert world.ended["quick"] == world.ended["slow"] >= 60


def test_with_enough_tokens_for_a_call_nobody_is_waited_for() -> None:
    names = {"a": 0, "b": 1, "c": 2, "slow": 2}
    world = play(
        lambda world: asyncio.gather(
            *(world.request(name, at, 60 if name == "slow" else 2, enough=192) for name, at in names.items())
        )
    )
    assert world.ended["a"] == world.ended["b"] == world.ended["c"] <= 8 < world.ended["slow"]


def test_nobody_waits_longer_than_the_limit_for_one_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_SECONDS", 0.0)

    async def work(world: World) -> None:
        world.arrivals.begin()
        await world.request("a", 0, 0)

    assert "a" in play(work).ended


def test_one_that_began_long_ago_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that comes byte by byte must not make everybody else wait as long as the limit is."""
    monkeypatch.setattr(module, "LONGEST_SECONDS", 0.2)

    async def work(world: World) -> None:
        world.arrivals.begin()
        await asyncio.sleep(0.3)
        begun = world.round
        await world.request("a", 0, 0)
        world.ended["a"] -= begun

    assert play(work).ended["a"] <= ROUNDS + 3


def test_one_that_is_refused_is_not_waited_for() -> None:
    async def work(world: World) -> None:
        refused = world.arrivals.begin()
        waiting = asyncio.ensure_future(world.request("a", 0, 0))
        for _ in range(3 * ROUNDS):
            await asyncio.sleep(0)
        assert not world.ended
        refused.over()
        refused.over()
        await waiting
        assert not world.arrivals.coming

    assert "a" in play(work).ended


def test_a_client_that_leaves_meanwhile_holds_up_nobody() -> None:
    async def work(world: World) -> None:
        gone = asyncio.ensure_future(world.request("gone", 0, 0))
        other = asyncio.ensure_future(world.request("other", 1, 2))
        for _ in range(3):
            await asyncio.sleep(0)
        gone.cancel()
        await other

    assert set(play(work).ended) == {"other"}


def slots_of(tiny_bundle: Path) -> ScriptedSlots:
    vocab = open_bundle(tiny_bundle).manifest.facts.vocab_size
    return ScriptedSlots(4, rule=lambda history: 70, vocab=vocab, max_length=512)


def test_prompts_of_one_request_are_one_call(tiny_bundle: Path) -> None:
    slots = slots_of(tiny_bundle)
    with running(scripted(tiny_bundle, slots)) as server:
        answer = server.complete([[5, 6, 7], [8, 9], [10, 11, 12, 13]], max_tokens=1)
        assert slots.calls == [("together", (3, 2, 4))]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


def send_at_once(server: Running, requests: int) -> None:
    """While the server's event loop stands still, which then finds all of them, but for the last byte of the last one:
    it comes when all have begun. Waits for all answers.
    """
    with server.standing():
        connections = [socket.create_connection(server.address, timeout=60) for _ in range(requests)]
        for number, connection in enumerate(connections):
            body = json.dumps({"prompt": [20 + number, 21, 22], "max_tokens": 1})
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body[:-1]}".encode())
            if number < requests - 1:
                connection.sendall(body[-1:].encode())
    server.wait_until(lambda: server.served.working == requests)
    connections[-1].sendall(body[-1:].encode())
    for connection in connections:
        with connection:
            received = b""
            while part := connection.recv(65536):
                received += part
            assert received.startswith(b"HTTP/1.1 200")


@pytest.fixture
def in_one_turn() -> Iterator[None]:
    """No thread takes the interpreter from another one that has work: on a busy machine the engine's would take it
    between two of the requests that one round of the event loop hands over.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("in_one_turn")
def test_requests_of_several_clients_at_the_same_moment_are_one_call(tiny_bundle: Path) -> None:
    slots = slots_of(tiny_bundle)
    with running(scripted(tiny_bundle, slots)) as server:
        send_at_once(server, 4)
    assert slots.calls == [("together", (3, 3, 3, 3))]
