"""One server behind the front: its application is called here as uvicorn would call it, without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

    from doge_deploy.serve.http.app import Served
    from doge_deploy.serve.ray.arguments import Arguments

_log = logging.getLogger("doge_deploy.serve")

Message = MutableMapping[str, Any]
"""Of ASGI."""

MAX_WAITING = 64
"""Messages of an answer that wait to be read. With more of them the application waits, as it does for a connection that
takes nothing: a stream that nobody reads is given up then, and its slot is free."""

TELLING_SECONDS = 10.0
"""How long answers that have begun may take when an engine has ended."""

ENDING_SECONDS = 1.0
"""From the end of the last of them to that of the process: what Ray holds of it must have been sent."""

_LEAVING_SECONDS = 5.0
"""How long the application may take to notice that nobody waits for its answer."""


@dataclass(frozen=True)
class Call:
    """A request that can be sent to another process."""

    scope: Mapping[str, Any]
    """Of ASGI; what of it is plain data."""
    body: bytes = field(repr=False)


class Replica:
    """The models, engines and application of `doge-deploy serve`, in this process."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._answering = 0
        self._end: threading.Thread | None = None

    async def open(self, arguments: Arguments) -> None:
        """Open every bundle and start the engines.

        Raises:
            UsageError, UnsupportedModelError, BrokenBundleError, MissingDependencyError: one of them cannot be served.
        """
        from doge_deploy.serve.start import open_served, require_server

        require_server()
        paths = [Path(bundle) for bundle in arguments.bundles]
        await self.serve(await asyncio.to_thread(open_served, paths, arguments.options))

    async def serve(self, served: Served) -> None:
        """Start the engines of what is open."""
        from doge_deploy.serve.http.app import create_app

        self._served = served
        self._app = create_app(served)
        await self._stack.enter_async_context(self._app.router.lifespan_context(self._app))

    def end_if_failed(self) -> bool:
        """End this process soon where an engine has ended; whether one has.

        Ray passes no more requests to a process that is gone, and begins another one at once. One that only refuses
        them is the quickest of all, and so gets most of them, until it has failed three health checks. But whoever has
        lost a text with the engine must be told first: a request whose answer is lost with the process is given to
        another replica, where it may end the next engine.
        """
        failed = [name for name, model in self._served.texts.items() if not model.engine.alive]
        if failed and self._end is None:
            _log.error("replica ends", extra={"fields": {"reason": f"the engine of {', '.join(failed)} has ended"}})
            self._end = threading.Thread(target=self._end_when_told, name="doge-end", daemon=True)
            self._end.start()
        return bool(failed)

    def _end_when_told(self) -> None:
        """In a thread: the process must end though its event loop may not go on."""
        latest = time.monotonic() + TELLING_SECONDS
        while self._answering and time.monotonic() < latest:
            time.sleep(0.02)
        time.sleep(ENDING_SECONDS)
        os._exit(1)

    def samples(self) -> list[Sample]:
        """What `/metrics` of a server shows, without the times at which counting began."""
        families = self._served.metrics.registry.collect()
        return [one for family in families for one in family.samples if not one.name.endswith("_created")]

    async def close(self) -> None:
        """End what still runs with an error, and the engines."""
        await self._stack.aclose()

    async def answer(self, call: Call) -> AsyncIterator[list[Message]]:
        """The messages of the answer, those together that are there at the same time.

        Whoever stops to read, or is cancelled, is a client that went away.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        room, gone, read = asyncio.Semaphore(MAX_WAITING), asyncio.Event(), False

        async def receive() -> Message:
            nonlocal read
            if not read:
                read = True
                return {"type": "http.request", "body": call.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await room.acquire()
            messages.put_nowait(message)

        async def work() -> None:
            try:
                await self._app(dict(call.scope), receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(work())
        self._answering += 1
        try:
            ended = False
            while not ended:
                found = [await messages.get()]
                while not messages.empty():
                    found.append(messages.get_nowait())
                ended = found[-1] is None
                if batch := [message for message in found if message is not None]:
                    yield batch
                for _ in batch:  # it has been read
                    room.release()
            await task
        finally:
            gone.set()
            try:
                await asyncio.wait({task}, timeout=_LEAVING_SECONDS)
            finally:
                task.cancel()
                self._answering -= 1
