"""Events of the engine's thread, sorted to those who wait for them in the event loop; times are taken here."""

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
"""Events of one request that wait to be sent: a client that does not read its stream loses it, and its slot is free."""


class _Waiter:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.arrived = perf_counter()
        self.last: float | None = None
        self.ended = False
        """The engine is done with it."""
        self.closed = False
        """Nothing more is put into `events`."""


class Inbox:
    """One for each model.

    Args:
        model: the name, for metrics.
        metrics: gets the times.
    """

    def __init__(self, model: str, metrics: Metrics) -> None:
        self._model, self._metrics = model, metrics
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
            waiter.events.put_nowait(event)
            if waiter.events.qsize() > MAX_UNREAD and not waiter.ended:
                waiter.closed = True
                waiter.engine.cancel(name)
                waiter.events.put_nowait(Finished("error", "", _not_read()))

    def _time(self, waiter: _Waiter, event: Event, now: float) -> None:
        if isinstance(event, Started):
            self._metrics.queue_time.labels(self._model).observe(now - waiter.arrived)
        elif isinstance(event, Produced):
            if waiter.last is None:
                self._metrics.first_token.labels(self._model).observe(now - waiter.arrived)
            else:
                self._metrics.inter_token.labels(self._model).observe(now - waiter.last)
            waiter.last = now
        elif isinstance(event, Finished):
            waiter.ended = True
            self._metrics.latency.labels(self._model).observe(now - waiter.arrived)

    @contextlib.asynccontextmanager
    async def submitted(self, engine: Engine, requests: Sequence[Request]) -> AsyncIterator[list[AsyncIterator[Event]]]:
        """The events of requests, one iterator each; what has not ended when the block is left is cancelled.

        Raises:
            QueueFullError: the queue does not take all of them; then it has none of them.
            EngineStoppedError: the engine has ended.
        """
        try:
            for request in requests:
                if self._failed is not None:
                    raise EngineStoppedError(self._failed)
                self._waiters[request.id] = _Waiter(engine)
                await asyncio.wrap_future(engine.submit(request))
            yield [self._events(request.id) for request in requests]
        finally:
            for request in requests:
                waiter = self._waiters.pop(request.id, None)
                if waiter is not None and not waiter.ended:
                    engine.cancel(request.id)

    async def _events(self, name: str) -> AsyncIterator[Event]:
        waiter = self._waiters[name]
        while True:
            event = await waiter.events.get()
            yield event
            if isinstance(event, Finished):
                return

    def fail(self, message: str) -> None:
        """End everything that waits, and all that comes, with an error: the engine will send nothing more."""
        self._failed = message
        for waiter in self._waiters.values():
            if not (waiter.ended or waiter.closed):
                waiter.closed = True
                waiter.events.put_nowait(Finished("error", "", EngineStoppedError(message)))

    @property
    def waiting(self) -> int:
        """Requests that have not ended."""
        return len(self._waiters)


def _not_read() -> ApiError:
    return ApiError(408, f"the stream was not read: {MAX_UNREAD} tokens waited", code="stream_not_read")
