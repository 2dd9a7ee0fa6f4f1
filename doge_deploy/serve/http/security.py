"""API keys and the size of bodies, before anything is parsed."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from doge_deploy.errors import UsageError
from doge_deploy.serve.http.errors import ApiError, response

OPEN_PATHS = frozenset({"/", "/page/page.css", "/page/page.js", "/health", "/ready", "/openapi.json"})
"""What needs no key: nothing of it shows a prompt or takes work."""

MAX_BODY_BYTES = 4 * 1024 * 1024

MAX_HELD_BYTES = 64 * 1024 * 1024
"""Of all bodies together that are being received or worked on."""

MAX_BODY_PARTS = 2**18
"""Lists and objects of a body. They are counted by their brackets, also by those in texts: they have to be known before
anything is parsed, and there is no text of so many that fits into a prompt."""

_PART_BYTES = 128
"""What one of them takes at least, while its text may have two bytes."""


def read_keys(file: Path) -> tuple[bytes, ...]:
    """API keys, one per line; blank lines and those that begin with # are passed over.

    Raises:
        UsageError: the file cannot be read or holds no key.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file}: cannot be read: {error}") from error
    keys = tuple(line.strip().encode() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise UsageError(f"--api-key-file {file}: holds no key; write one per line")
    return keys


class Gate:
    """Refuses requests without a key, and bodies that are too large, alone or all together, whatever headers say.

    What counts is also what a body takes in memory when it is parsed: 4 MB of `[[[[` became 180, and 14 such bodies
    occupied the server for minutes, since Python looks through all that is there again and again.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Collection[bytes] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._app, self._keys, self._limit, self._held_limit = app, tuple(keys), max_body_bytes, max_held_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
            await response(error)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and float(length) > self._limit:  # int() takes no more than some thousand digits
            await response(self._too_large())(scope, receive, send)
            return
        await self._counted(scope, receive, send)

    def _knows(self, header: bytes) -> bool:
        """In a time that does not depend on how much of a key is right."""
        kind, _, given = header.partition(b" ")
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return kind.lower() == b"bearer" and any(found)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limit} bytes")

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What is read of a body is counted, since headers need not say how long it is; it is held until the answer's
        end.
        """
        received = parts = held = 0
        refusal: ApiError | None = None
        told = False

        async def counting() -> Message:
            nonlocal received, parts, held, refusal
            message = await receive()
            body = message.get("body", b"")
            received += len(body)
            parts += body.count(b"[") + body.count(b"{")
            more = max(received, parts * _PART_BYTES) - held
            held += more
            self._held += more
            if received > self._limit:
                refusal = self._too_large()
            elif parts > MAX_BODY_PARTS:
                refusal = ApiError(413, f"the body has more than {MAX_BODY_PARTS} opening brackets, [ and {{ together")
            elif more and self._held > self._held_limit:
                refusal = ApiError(429, f"the server is busy: bodies of {self._held_limit} bytes are being worked on")
            if refusal is not None and message["type"] == "http.request":
                # an empty end: what is made of it is not sent
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        async def replacing(message: Message) -> None:
            nonlocal told
            if refusal is None:
                await send(message)
            elif not told:
                told = True
                await response(refusal)(scope, receive, send)

        try:
            await self._app(scope, counting, replacing)
        finally:
            self._held -= held
