"""Events on their way from the engine's thread to their readers: who does not read is given up, and nobody else."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from scripted_requests import Digits
from scripted_slots import ScriptedSlots

from doge_deploy.runtime.sampling import Sampler, SamplingOptions
from doge_deploy.serve import engine as engine_module
from doge_deploy.serve.engine import Engine, EngineStoppedError
from doge_deploy.serve.http import inbox as inbox_module
from doge_deploy.serve.http.errors import ApiError
from doge_deploy.serve.http.inbox import MAX_UNREAD, Inbox, Mail
from doge_deploy.serve.http.metrics import Metrics
from doge_deploy.serve.request import Finished, Produced, Request
from doge_deploy.serve.scheduler import Limits, QueueFullError, Scheduler


class Bare:
    """An inbox and its engine, whose thread does not run: events are put in here."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.inbox = Inbox("doge", Metrics())
        self.scheduler = Scheduler(ScriptedSlots(1), limits)
        self.engine = Engine(self.scheduler, self.inbox.deliver)

    def request(self, name: str, tokens: int = 9) -> Request:
        return Request(name, [5], Sampler(SamplingOptions()), tokens, lambda event: None, Digits())

    async def engine_reads(self) -> None:
        """Let it do what it was asked for, once."""
        self.engine._inbox.put(None)
        await asyncio.to_thread(self.engine._read_inbox)


def tokens(count: int) -> list[tuple[str, Any]]:
    return [("a", Produced(token, "", None)) for token in range(count)]


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_reads_loses_nothing_however_much_comes_at_once(reads: bool) -> None:
    """As when the event loop was busy for long; one that is still busy with what came before is given up."""
    found: list[int | Finished] = []

    async def read(mail: Mail, go: asyncio.Event) -> None:
        async for events in mail:
            found.extend(event.token if isinstance(event, Produced) else event for _, event in events)  # type: ignore[misc]
            if not reads:
                await go.wait()

    async def main() -> None:
        bare, go = Bare(), asyncio.Event()
        asked = asyncio.ensure_future(bare.engine_reads())
        async with bare.inbox.submitted(bare.engine, [bare.request("a")]) as mail:
            await asked
            reading = asyncio.ensure_future(read(mail, go))
            await asyncio.sleep(0)
            bare.inbox._sort(tokens(1))
            await asyncio.sleep(0)
            bare.inbox._sort(tokens(2 * MAX_UNREAD))
            bare.inbox._sort([("a", Finished("length"))])
            go.set()
            await reading

    asyncio.run(main())
    end = found.pop()
    assert isinstance(end, Finished)
    if reads:
        assert end.error is None and found == [0, *range(2 * MAX_UNREAD)]
    else:
        assert isinstance(end.error, ApiError) and end.error.code == "stream_not_read" and len(found) == MAX_UNREAD + 2


@pytest.mark.parametrize("ended", [False, True])
def test_what_was_refused_is_not_cancelled(ended: bool) -> None:
    """Nobody has to look for it in the queue, and no metric counts it."""

    async def main() -> None:
        bare = Bare(Limits(queue_requests=1))
        if ended:
            bare.engine._refuse_the_rest()
        reading = asyncio.ensure_future(bare.engine_reads())
        with pytest.raises(EngineStoppedError if ended else QueueFullError):
            async with bare.inbox.submitted(bare.engine, [bare.request(name) for name in "abc"]):
                raise AssertionError("it was taken")
        await reading
        assert bare.engine._inbox.empty() and bare.inbox.waiting == 0 and bare.scheduler.idle

    asyncio.run(main())


def test_what_was_refused_is_freed_at_once() -> None:
    """Not when Python's collector comes: with more clients than the queue takes, most requests are refused."""

    async def main() -> list[weakref.ref[Request]]:
        bare = Bare(Limits(queue_requests=1))
        reading = asyncio.ensure_future(bare.engine_reads())
        requests = [bare.request(name) for name in "abc"]
        known = [weakref.ref(one) for one in requests]
        with pytest.raises(QueueFullError):
            async with bare.inbox.submitted(bare.engine, requests):
                raise AssertionError("it was taken")
        await reading
        return known

    gc.collect()
    gc.disable()
    try:
        known = asyncio.run(main())
        assert [one() for one in known] == [None] * 3
    finally:
        gc.enable()


def test_who_leaves_while_the_engine_is_asked_is_not_computed() -> None:
    async def main() -> None:
        bare = Bare()

        async def ask() -> None:
            async with bare.inbox.submitted(bare.engine, [bare.request("a")]):
                raise AssertionError("it was taken")

        asking = asyncio.ensure_future(ask())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await bare.engine_reads()
        assert bare.scheduler.idle and bare.inbox.waiting == 0

    asyncio.run(main())


class Timed(Bare):
    """The same under a clock that only the rows move on: each call takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (engine_module, inbox_module):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)
        super().__init__()
        self.inbox.attach(asyncio.get_running_loop())
        rows = self.scheduler.runner
        for name in ("prefill", "decode", "extend"):
            monkeypatch.setattr(rows, name, self._slow(getattr(rows, name)))

    def _slow(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*arguments: Any) -> Any:
            self.now += 1
            return call(*arguments)

        return taken

    async def answer(self, *names: str) -> None:
        """Requests of three tokens, one after the other in the only slot, to their ends."""
        asked = asyncio.ensure_future(self.engine_reads())
        async with self.inbox.submitted(self.engine, [self.request(name, 3) for name in names]) as mail:
            await asked
            while not self.scheduler.idle:
                self.scheduler.step()
                self.engine._after_call()
                await asyncio.sleep(0)
            async for _ in mail:
                pass


def test_the_time_in_the_queue_ends_with_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the first token, though both are told together."""

    async def main() -> tuple[list[float], list[float]]:
        bare = Timed(monkeypatch)
        times, found = bare.inbox._times, []
        for names in ("a", "bc"):
            before = times.queue_time.sum, times.first_token.sum
            await bare.answer(*names)
            found.append([times.queue_time.sum - before[0], times.first_token.sum - before[1]])
        assert sum(times.queue_time.counts) == 3
        return found[0], found[1]

    alone, behind = asyncio.run(main())
    assert alone == [0, 1]
    assert behind == [3, 1 + 4], "the second one waits for the three calls of the first"
