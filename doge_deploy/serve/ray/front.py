"""The front: passes requests on to replicas, and makes the best of it when one is lost.

An answer of which nothing has come out is asked for again, at another replica, also where the first takes no work. A
stream that has begun ends with an error event. So that it can be asked for again, of a stream the opening chunk is held
back, which has no token, and of any other answer all of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from fastapi.responses import JSONResponse

from doge_deploy.serve.http.errors import ApiError, as_api_error, error_body, response
from doge_deploy.serve.http.responses import DONE, event
from doge_deploy.serve.http.security import MAX_BODY_BYTES
from doge_deploy.serve.ray.replica import Call, Message

ATTEMPTS = 4
"""Replicas that a request is sent to before it is given up."""

READY_SECONDS = 5.0
"""Where no replica answers so long, the application is not ready. Other requests wait until there is one."""

LOST = "the replica that worked on this request was lost"

_SCOPE = ("type", "http_version", "method", "scheme", "path", "query_string", "root_path", "client", "server")

_log = logging.getLogger("doge_deploy.serve")

Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ReplicaLostError(Exception):
    """A replica is gone, or cannot be reached."""


class NoReplicaError(Exception):
    """There is no replica, nor will there be one."""


class BusyError(Exception):
    """As much waits as may wait."""


class Answer(Protocol):
    """Messages of an answer as they come."""

    async def next(self) -> list[Message] | None:
        """The next ones; None: that was all.

        Raises:
            ReplicaLostError, NoReplicaError, BusyError: there is no more, for that reason.
        """

    def cancel(self) -> None:
        """Nobody waits for it any more."""


class Front:
    """An ASGI application whose answers are those of replicas.

    Args:
        ask: sends a request to a replica.
    """

    def __init__(self, ask: Callable[[Call], Answer]) -> None:
        self._ask = ask

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        if (own := _answered_here(scope["path"])) is not None:
            await own(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:
            return
        plain = {name: scope[name] for name in _SCOPE if name in scope}
        call = Call({**plain, "headers": [tuple(header) for header in scope["headers"]]}, body)
        limit = READY_SECONDS if scope["path"] == "/ready" else None
        work = asyncio.ensure_future(self._answer_in_time(call, send, limit))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})

    async def _answer_in_time(self, call: Call, send: Send, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._answer(call, send)
        except TimeoutError:
            await _refuse(call, send, ApiError(503, f"no replica has answered for {seconds} s", code="no_replica"))

    async def _answer(self, call: Call, send: Send) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            outlet = _Outlet(send)
            try:
                await self._relay(call, outlet)
                return
            except ReplicaLostError as error:
                fields = {"path": call.scope["path"], "attempt": attempt, "begun": outlet.begun}
                _log.warning("replica lost", extra={"fields": {**fields, "reason": str(error)}})
                if outlet.begun:
                    await outlet.fail(LOST, "replica_lost")
                    return
            except BusyError as error:
                await _refuse(call, send, ApiError(429, f"the server is busy: {error}", code="queue_full"))
                return
            except NoReplicaError as error:
                await _refuse(call, send, ApiError(503, f"no replica can answer: {error}", code="no_replica"))
                return
            except Exception as error:  # a fault of ours, here or in the replica
                _log.exception("request failed", extra={"fields": {"path": call.scope["path"]}})
                if outlet.begun:
                    await outlet.fail(f"internal error: {type(error).__name__}")
                else:
                    await _refuse(call, send, as_api_error(error))
                return
        await _refuse(call, send, ApiError(503, f"{LOST}, and so were {ATTEMPTS - 1} more", code="replica_lost"))

    async def _relay(self, call: Call, outlet: _Outlet) -> None:
        answer = self._ask(call)
        try:
            while (messages := await answer.next()) is not None:
                for message in messages:
                    await outlet.take(message)
        except BaseException:
            answer.cancel()
            raise


class _Outlet:
    """Holds back what could still come from another replica."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[Message] = []
        self._streams = False
        self.begun = False
        """Something has come out, so that the answer cannot begin anew."""

    async def take(self, message: Message) -> None:
        """One more message of the answer.

        Raises:
            ReplicaLostError: the replica takes no work, as one whose engine has just ended.
        """
        if message["type"] == "http.response.start":
            if message["status"] == 503:
                raise ReplicaLostError("it takes no work (503)")
            # Ray names requests, and its name is the one that the replica was given
            headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
            self._streams = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
            message = {**message, "headers": headers}
        elif not message.get("more_body", False) or (self._streams and not is_opening(message.get("body", b""))):
            self.begun = True
        self._held.append(message)
        if self.begun:
            held, self._held = self._held, []
            for one in held:
                await self._send(one)

    async def fail(self, message: str, code: str | None = None) -> None:
        """End a stream that has begun."""
        body = event(error_body(500, message, code=code)) + DONE
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def is_opening(body: bytes) -> bool:
    """Whether server-sent events hold nothing of a text: each only says who speaks, as the first one of a chat does."""
    for line in body.split(b"\n"):
        if not line.startswith(b"data: "):
            continue
        try:
            choices = json.loads(line.removeprefix(b"data: "))["choices"]
            deltas = [choice["delta"] for choice in choices]
        except (ValueError, KeyError, TypeError):
            return False
        if not deltas or any(not delta.get("role") or delta.get("content") for delta in deltas):
            return False
    return True


def _answered_here(path: str) -> JSONResponse | None:
    if path == "/health":
        return JSONResponse({"status": "ok"})
    if path == "/metrics":
        return response(
            ApiError(404, "metrics are those of a replica; Ray exports them on each node, see docs/serve.md")
        )
    return None


async def _body(receive: Receive) -> bytes | None:
    """The whole body, or as much of it as shows that it is too large; None where the client left."""
    body = bytearray()
    while len(body) <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return bytes(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(call: Call, send: Send, error: ApiError) -> None:
    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    await response(error)(dict(call.scope), nothing, send)


async def _live(receive: Receive, send: Send) -> None:
    """Nothing has to be started or stopped."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
