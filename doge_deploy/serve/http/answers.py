"""Answers of chat and text completions: from events to a whole body, or to a stream."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from doge_deploy.serve.http.chunks import Chunks, head, take
from doge_deploy.serve.http.forms import Form
from doge_deploy.serve.http.inbox import Inbox, Mail
from doge_deploy.serve.http.offload import Offload
from doge_deploy.serve.http.plans import Plan
from doge_deploy.serve.http.responses import HOLE, Encoded, written
from doge_deploy.serve.request import PromptScored

_Result = TypeVar("_Result")

CLOSED_REQUEST = 499
"""What the log says of a client that went away; nobody reads it."""


async def answer(plan: Plan, form: Form, inbox: Inbox, http: HttpRequest, offload: Offload) -> Response:
    """Run the plan; a stream, or a whole answer. A client that goes away frees its slots."""
    if plan.stream:
        stack = contextlib.AsyncExitStack()
        # what refuses the request (a full queue) must become its status, so it is submitted before the answer begins
        mail = await stack.enter_async_context(inbox.submitted(plan.model.engine, plan.requests))
        return _Stream(streamed(Chunks(plan, form), mail, offload), stack)
    async with inbox.submitted(plan.model.engine, plan.requests) as mail:
        if not await unless_gone(_collected(plan, mail), http.receive):
            return Response(status_code=CLOSED_REQUEST)
    whole = _whole(plan, form) if plan.texts is None else await offload(partial(_whole, plan, form))
    return Response(whole, media_type="application/json")


def _whole(plan: Plan, form: Form) -> bytes:
    """The body of a whole answer. With logprobs it may be tens of megabytes: each choice is bytes before the next one
    is written, so that no single step of that, in which other threads have to wait, takes long.
    """
    body = {**head(plan, form.object), "choices": Encoded(f"[{HOLE}]"), "usage": plan.usage().json()}
    before, after = written(body).encode().split(HOLE.encode())
    choices = [written(form.choice(choice, plan)).encode() for choice in plan.choices]
    return b"%b%b%b" % (before, b",".join(choices), after)


class _Stream(Response):
    """A stream that frees its slots when it ends, however it ends: also where the client left before its first byte.

    Each piece is sent by one task, without those that `StreamingResponse` starts: it is sent for each token.
    """

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], stack: contextlib.AsyncExitStack) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._content, self._stack = content, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await unless_gone(self._write(send), receive)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._content:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(work: Coroutine[Any, Any, _Result], receive: Receive) -> _Result | None:
    """What `work` gives; None, and the work is cancelled, where the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.wait((task, gone))
        del task, one  # an error of the work holds this frame: what holds itself is freed late


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collected(plan: Plan, mail: Mail) -> bool:
    """Read every choice to its end; true.

    Raises:
        ApiError: one of them failed.
    """
    async for events in mail:
        for index, found in events:
            take(plan, plan.choices[index], found)
    return True


async def streamed(chunks: Chunks, mail: Mail, offload: Offload) -> AsyncIterator[bytes]:
    """Server-sent events of all choices as they come, those together that are there at the same time."""
    ready: list[bytes] = []
    try:
        async for events in mail:
            for index, found in events:
                if isinstance(found, PromptScored):  # one chunk with the logprobs of all of a prompt
                    ready += await offload(partial(chunks.of, index, found))
                else:
                    ready += chunks.of(index, found)
            if ready and mail.open:
                yield b"".join(ready)
                ready.clear()
        ready += chunks.end()
    except Exception as error:  # the answer has begun: its status cannot be changed any more
        ready += chunks.failed(error)
    yield b"".join(ready)


def new_name(prefix: str) -> str:
    """A name for an answer, such as `chatcmpl-3f2a...`."""
    return f"{prefix}-{secrets.token_hex(12)}"
