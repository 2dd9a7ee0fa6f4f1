"""While nobody asks for anything, memory that requests took and freed goes back to the system."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from doge_deploy.serve.heap import give_back

REST_SECONDS = 0.5
"""A server that had nothing to do for so long lets go of memory that it does not need."""


class Rest:
    """Gives back once after the last of some requests, whether they were answered or refused.

    A request counts where it has a body: what is read in between, such as metrics, takes nothing.

    Args:
        app: answers the requests.
        busy: whether something is still being computed, for a client that has gone.
    """

    def __init__(self, app: Any, busy: Callable[[], bool]) -> None:
        self._app, self._busy = app, busy
        self._working = 0
        self._timer: asyncio.TimerHandle | None = None
        self._giving: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._working += 1
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._app(scope, receive, send)
        finally:
            self._working -= 1
            if not self._working:
                self._wait()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(REST_SECONDS, self._rested)

    def _rested(self) -> None:
        if self._busy():
            self._wait()
        else:
            self._giving = asyncio.ensure_future(asyncio.to_thread(give_back))
