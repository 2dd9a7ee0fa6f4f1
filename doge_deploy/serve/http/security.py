"""API keys and the size of bodies, before anything is parsed."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from doge_deploy.errors import UsageError
from doge_deploy.serve.http.errors import ApiError, response

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json"})
"""What needs no key: nothing of it shows a prompt or takes work."""

MAX_BODY_BYTES = 8 * 1024 * 1024


def read_keys(file: Path) -> tuple[bytes, ...]:
    """API keys, one a line; blank lines and those that begin with # are passed over.

    Raises:
        UsageError: the file cannot be read or holds no key.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file}: cannot be read: {error}") from error
    keys = tuple(line.strip().encode() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise UsageError(f"--api-key-file {file}: holds no key; write one a line")
    return keys


class Gate:
    """Refuses requests without a key, and bodies that are too large, whatever their headers say."""

    def __init__(self, app: ASGIApp, keys: Collection[bytes] = (), max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._app, self._keys, self._limit = app, tuple(keys), max_body_bytes

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
        if length.isdigit() and int(length) > self._limit:
            await self._too_large()(scope, receive, send)
            return
        await self._counted(scope, receive, send)

    def _knows(self, header: bytes) -> bool:
        """In a time that does not depend on how much of a key is right."""
        kind, _, given = header.partition(b" ")
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return kind.lower() == b"bearer" and any(found)

    def _too_large(self) -> ASGIApp:
        return response(ApiError(413, f"the body is larger than {self._limit} bytes"))

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """For bodies that come in chunks: they do not say how long they are."""
        received, refused = 0, False

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                # an empty end: what is made of it is not sent
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        async def replacing(message: Message) -> None:
            nonlocal refused
            if received <= self._limit:
                await send(message)
            elif not refused:
                refused = True
                await self._too_large()(scope, receive, send)

        await self._app(scope, counting, replacing)
