"""Events of the engine's thread, sorted to those who wait for them in the event loop. Times are taken here, as a client
sees them, except the one at which a request got its slot: its event goes out only behind the next call of the runner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from time import perf_counter

from doge_deploy.serve.engine import Engine, EngineStoppedError
from doge_deploy.serve.http.errors import ApiError
from doge_deploy.serve.http.metrics import Metrics
from doge_deploy.serve.request import Event, Finished, Produced, Request, Started

MAX_UNREAD = 1024
"""Events of one request that wait until earlier ones are sent: a client that does not read its stream loses it, and its
slot is free. Where it is this process that was busy with something else for so long, nobody loses anything.
"""


class Mail(AsyncIterator[list[tuple[int, Event]]]):
    """The events of an answer's requests: each time all that have come since, with the number of their request.

    Its reader is woken once, however many events come in one turn of the loop.
    """

    def __init__(self) -> None:
        self.waiters: list[_Waiter] = []
        self._events: list[tuple[int, Event]] = []
        self._arrived: asyncio.Future[None] | None = None
        self.awaited = False
        """Its reader has done all that it had to do with earlier events."""

    @property
    def open(self) -> bool:
        """More will come."""
        return not all(waiter.closed for waiter in self.waiters)

    def put(self, waiter: _Waiter, event: Event) -> None:
        """One more event of a request."""
        waiter.unread += 1
        self._events.append((waiter.index, event))
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def __anext__(self) -> list[tuple[int, Event]]:
        self.awaited = True
        if not self._events:
            if not self.open:
                raise StopAsyncIteration
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        self.awaited = False
        events, self._events = self._events, []
        for waiter in self.waiters:
            waiter.unread = 0
        return events


class _Waiter:
    """One request."""

    def __init__(self, engine: Engine, mail: Mail) -> None:
        self.engine, self.mail = engine, mail
        self.index = len(mail.waiters)
        self.unread = 0
        self.arrived = perf_counter()
        self.last: float | None = None
        self.ended = False
        """The engine is done with it."""
        self.closed = False
        """Nothing more is put into the mail."""
        mail.waiters.append(self)


class Inbox:
    """One for each model.

    Args:
        model: the name, for metrics.
        metrics: gets the times.
    """

    def __init__(self, model: str, metrics: Metrics) -> None:
        self._times = metrics.of(model)
        self._waiters: dict[str, _Waiter] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed: str | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that events go to; before the engine starts."""
        self._loop = loop

    def deliver(self, events: list[tuple[str, Event]]) -> None:
        """For the engine's thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there any more
            self._loop.call_soon_threadsafe(self._sort, events)

    def _sort(self, events: list[tuple[str, Event]]) -> None:
        now = perf_counter()
        for name, event in events:
            waiter = self._waiters.get(name)
            if waiter is None or waiter.closed:
                continue
            self._time(waiter, event, now)
            waiter.mail.put(waiter, event)
            if waiter.ended:
                waiter.closed = True
            elif waiter.unread > MAX_UNREAD and not waiter.mail.awaited:
                waiter.closed = True
                waiter.engine.cancel(name)
                waiter.mail.put(waiter, Finished("error", "", _not_read()))

    def _time(self, waiter: _Waiter, event: Event, now: float) -> None:
        times = self._times
        if isinstance(event, Produced):
            if waiter.last is None:
                times.first_token.observe(now - waiter.arrived)
            else:
                times.inter_token.observe(now - waiter.last)
            waiter.last = now
        elif isinstance(event, Started):
            times.queue_time.observe(event.slot_time - waiter.arrived)
        elif isinstance(event, Finished):
            waiter.ended = True
            times.latency.observe(now - waiter.arrived)

    @contextlib.asynccontextmanager
    async def submitted(self, engine: Engine, requests: Sequence[Request]) -> AsyncIterator[Mail]:
        """The events of requests; what has not ended when the block is left is cancelled.

        Raises:
            QueueFullError: the queue does not take all of them; then it has none of them.
            EngineStoppedError: the engine has ended.
        """
        mail = Mail()
        try:
            if self._failed is not None:
                raise EngineStoppedError(self._failed)
            for request in requests:
                self._waiters[request.id] = _Waiter(engine, mail)
            try:
                await asyncio.wrap_future(engine.submit_all(requests))
            except Exception:
                for one in mail.waiters:
                    one.ended = True  # never begun: there is nothing to be cancelled
                raise
            yield mail
        finally:
            for request in requests:
                waiter = self._waiters.pop(request.id, None)
                if waiter is not None and not waiter.ended:
                    engine.cancel(request.id)
            mail.waiters.clear()  # they hold it: what holds itself is freed late

    def fail(self, message: str) -> None:
        """End everything that waits, and everything that comes, with an error: the engine will send nothing more."""
        self._failed = message
        for waiter in self._waiters.values():
            if not waiter.closed:
                waiter.closed = True
                waiter.mail.put(waiter, Finished("error", "", EngineStoppedError(message)))

    @property
    def waiting(self) -> int:
        """Requests that have not ended."""
        return len(self._waiters)


def _not_read() -> ApiError:
    return ApiError(408, f"the stream was not read: {MAX_UNREAD} tokens waited", code="stream_not_read")
