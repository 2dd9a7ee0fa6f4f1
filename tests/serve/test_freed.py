"""What a request took is freed when it has ended, not when Python's collector comes: it does not see how large a prompt
or a grammar is, and with many clients hundreds of requests that had ended were there.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import Running, of_bundle, running
from starlette.types import Message

from doge_deploy.serve.http.answers import unless_gone
from doge_deploy.serve.scheduler import Limits


@pytest.fixture(scope="module")
def server(tiny_bundle_all: Path) -> Iterator[Running]:
    with running(of_bundle(tiny_bundle_all, slots=2, limits=Limits(queue_requests=20))) as found:
        yield found


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def ours() -> Counter[str]:
    """What there is of each kind of the server's objects; texts of tokens stay."""
    kinds = (type(one) for one in gc.get_objects())
    return Counter(
        f"{kind.__module__}.{kind.__name__}"
        for kind in kinds
        if str(kind.__module__).startswith("doge_deploy.serve") and kind.__name__ != "TokenText"
    )


def leave(server: Running) -> None:
    """Go after the first piece of a stream."""
    body = {"prompt": "x = ", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())


REQUESTS: dict[str, Callable[[Running], object]] = {
    "whole": lambda server: server.complete("x = ", max_tokens=4),
    "streamed": lambda server: server.stream("/v1/completions", prompt="x = ", max_tokens=4),
    "several": lambda server: server.complete(["x = ", "def"], n=3, max_tokens=4),
    "with a grammar": lambda server: server.complete("x = ", guided_regex="[a-z]+", max_tokens=4),
    "scored": lambda server: server.complete("x = 1", echo=True, logprobs=2, max_tokens=0),
    "a chat": lambda server: server.stream("/v1/chat/completions", messages=[{"role": "user", "content": "a"}]),
    "refused by its values": lambda server: server.post("/v1/completions", 400, prompt="x", temperature=-1),
    "refused by its length": lambda server: server.post("/v1/completions", 400, prompt="x " * 2000),
    "left": leave,
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_nothing_of_a_request_is_left(server: Running, no_collector: None, kind: str) -> None:
    REQUESTS[kind](server)  # what is made for the first of its kind stays
    server.wait_until(server.at_rest)
    gc.collect()
    before = ours()
    for _ in range(3):
        REQUESTS[kind](server)
    server.wait_until(server.at_rest)
    server.wait_until(lambda: not ours() - before)


def test_nothing_is_left_of_what_failed(no_collector: None) -> None:
    class Plan:
        """Something large."""

    async def work(plan: Plan) -> None:
        raise ValueError("NaN")

    async def receive() -> Message:
        return await asyncio.get_running_loop().create_future()

    async def main() -> weakref.ref[Plan]:
        plan = Plan()
        with contextlib.suppress(ValueError):
            await unless_gone(work(plan), receive)
        return weakref.ref(plan)

    assert asyncio.run(main())() is None
