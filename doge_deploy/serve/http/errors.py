"""Every error as OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`.

Reference: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from doge_deploy.errors import DogeDeployError, UsageError
from doge_deploy.serve.engine import EngineFailedError, EngineStoppedError
from doge_deploy.serve.http.findings import place, told
from doge_deploy.serve.scheduler import QueueFullError
from doge_deploy.text.lengths import TooLongError

RETRY_AFTER_S = 1
"""What a client is told to wait when the queue is full."""

_BELOW_V1 = ("/chat/completions", "/completions", "/embeddings", "/models")
"""How paths end at which clients ask whose `base_url` is not the one that they need; the longest first."""

_LONGEST = 500
"""Characters of a message: a value that a client sent is quoted, and may be long."""


class ApiError(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def shutting_down() -> ApiError:
    """The server takes nothing more, or gives up what it has."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
    """Within it a UsageError becomes a refusal that names the field that the client has to change.

    Raises:
        ApiError: a UsageError was raised within.
    """
    try:
        yield
    except UsageError as error:
        code = "context_length_exceeded" if isinstance(error, TooLongError) else None
        raise ApiError(400, f"{field}: {str(error).removeprefix(f'{field}: ')}", param=field, code=code) from error


def field_of(name: str, index: int, entries: Sequence[object]) -> str:
    """The field of one of several `entries`; of the only one it is `name`, which may hold it without a list."""
    return name if len(entries) == 1 else f"{name}.{index}"


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The object, of the type that OpenAI gives this status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    text = message if len(message) <= _LONGEST else message[: _LONGEST - 6] + " [...]"
    # what a client sent may hold what is no text; the answer is UTF-8
    text = text.encode("utf-8", "replace").decode("utf-8")
    param = None if param is None else param[:_LONGEST]
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about an error of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, f"the server is busy: {error}", code="queue_full")
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    if isinstance(error, (DogeDeployError, EngineFailedError)):
        return ApiError(500, str(error))
    return ApiError(500, f"internal error: {type(error).__name__}")


def response(error: ApiError) -> JSONResponse:
    """The error as an answer."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    body = error_body(error.status, error.message, param=error.param, code=error.code)
    return JSONResponse(body, error.status, headers)


def validation_error(error: RequestValidationError) -> ApiError:
    """One finding of the first field, with what is legal; 400 as OpenAI's API has it, not FastAPI's 422."""
    finding = _most_telling(error.errors())
    if finding["loc"] == ("body",) and finding["type"] in _NO_OBJECT:
        what = "the body is empty; it" if finding["type"] == "missing" else "the body"
        return ApiError(400, f"{what} must be a JSON object")
    parts = place(finding)
    # parts of a union's own names, such as `list[str]`, say nothing to a client
    field = ".".join(part for part in parts if part.replace("_", "").isalnum()) or None
    if finding["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {finding.get('ctx', {}).get('error', finding['msg'])}")
    if finding["type"] == "extra_forbidden":
        name = parts[-1]
        if not name.replace("_", "").isalnum():  # told as it came
            field = ".".join([*([] if field is None else [field]), repr(name)])
        return ApiError(400, f"{field}: not supported by this server", param=field, code="unsupported_parameter")
    return ApiError(400, f"{field}: {told(finding)}" if field else told(finding), param=field)


_NO_OBJECT = ("missing", "model_attributes_type", "model_type", "dict_type")
"""Types of findings about a body that is nothing, or something else than an object."""


def _kind_error(request: Request) -> ApiError | None:
    """What is wrong with the kind of a body that could not be read, if its headers say."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        return ApiError(415, f"Content-Encoding: {coding} is not taken; send the body as it is")
    kind = request.headers.get("content-type", "").strip()
    media = kind.partition(";")[0].strip().lower()
    if media == "application/json" or (media.startswith("application/") and media.endswith("+json")):
        return None
    return ApiError(415, f"Content-Type: {kind or 'none'}; must be application/json", code="unsupported_content_type")


def _no_path(path: str) -> str:
    """What to do instead of asking at a path that there is not."""
    for end in _BELOW_V1:
        if path.endswith(end):
            return f"there is no {path}; it is /v1{end} here: the client's base_url must be http://HOST:PORT/v1"
    if path.removeprefix("/v1").startswith("/responses"):
        return (
            f"there is no {path}: OpenAI's Responses API is not part of this server; "
            "tell the client to use chat completions"
        )
    return f"there is no {path}; /openapi.json lists the paths"


def _unread(error: BaseException | None) -> str:
    """Why JSON could not be read, where it is not its grammar."""
    if isinstance(error, UnicodeDecodeError):
        return f"the body is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}"
    if isinstance(error, RecursionError):
        return "the body is nested too deeply"
    if isinstance(error, ValueError):
        return "the body holds a number of too many digits"
    return "the body cannot be read"


def _most_telling(findings: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Where a field may be of several types there is a finding for each: what is wrong with a value of the right type
    says more than that it has not another type, and what is wrong deep within it more than what is wrong outside.
    """
    field = findings[0]["loc"][:2]
    of_field = [finding for finding in findings if finding["loc"][:2] == field]
    return max(of_field, key=lambda finding: (not finding["type"].endswith("_type"), len(finding["loc"])))


def install(app: FastAPI) -> None:
    """Handlers for everything that can be raised in a route."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        unreadable = isinstance(error.body, bytes) or any(one["type"] == "json_invalid" for one in error.errors())
        return response((_kind_error(request) if unreadable else None) or validation_error(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400 and error.__cause__ is not None:  # FastAPI could not read the body
            return response(_kind_error(request) or ApiError(400, _unread(error.__cause__)))
        path, message = quote(request.scope["path"]), str(error.detail)
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"
        if error.status_code == 404:
            message = _no_path(path)
        elif error.status_code == 405:
            message = f"{path} takes {headers['Allow']}; not {request.method}"
        return JSONResponse(error_body(error.status_code, message), error.status_code, headers)

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return response(as_api_error(error))

    for kind in (ApiError, DogeDeployError, EngineStoppedError):
        app.add_exception_handler(kind, ours)
