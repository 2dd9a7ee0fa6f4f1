"""The application: which path does what, and the life of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from doge_deploy import __version__
from doge_deploy.serve.http import errors, schemas
from doge_deploy.serve.http.answers import CLOSED_REQUEST, answer, new_name, unless_gone
from doge_deploy.serve.http.arrivals import Arrivals
from doge_deploy.serve.http.embeddings import FeatureModel, encoded
from doge_deploy.serve.http.errors import ApiError, about, field_of
from doge_deploy.serve.http.forms import ChatForm, Form, TextForm
from doge_deploy.serve.http.inbox import Inbox
from doge_deploy.serve.http.metrics import Metrics
from doge_deploy.serve.http.offload import Offload
from doge_deploy.serve.http.plans import Plan, conversation, plan_chat, plan_completion, rendered
from doge_deploy.serve.http.requests import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from doge_deploy.serve.http.responses import line_of_json, tokens_json
from doge_deploy.serve.http.rest import Rest
from doge_deploy.serve.http.schemas import ErrorAnswer
from doge_deploy.serve.http.security import MAX_BODY_BYTES, MAX_HELD_BYTES, OPEN_PATHS, Gate
from doge_deploy.serve.model import ServedText

PAGE = Path(__file__).parent.parent / "page"

_Model = TypeVar("_Model", bound="ServedText | FeatureModel")

_TASKS = {"text": "causal-lm", "embeddings": "features"}
"""What a bundle must have been exported for that makes it."""

_log = logging.getLogger("doge_deploy.serve")


@dataclass
class Served:
    """What a server has: its models by name, and whether it takes work."""

    texts: Mapping[str, ServedText] = field(default_factory=dict)
    features: Mapping[str, FeatureModel] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    inboxes: Mapping[str, Inbox] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    """No new work is taken; what runs is finished."""
    names: Sequence[str] = ()
    """All models, in the order in which their bundles were given."""
    verified: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What was found when a model's bundle was judged at the start, by the model's name."""
    runs_on: Mapping[str, str | int | None] = field(default_factory=dict)
    """For people: backend, engine, threads."""
    arrivals: Arrivals = field(default_factory=Arrivals)
    working: int = 0
    """Requests with a body that are being answered, from their first byte to the last of the answer."""

    @property
    def ready(self) -> bool:
        """Work is taken, and every engine runs."""
        return not self.draining and all(model.engine.alive for model in self.texts.values())

    @property
    def busy(self) -> bool:
        """Something is being computed."""
        return not all(model.engine.scheduler.idle for model in self.texts.values()) or any(
            model.waiting for model in self.features.values()
        )

    def text(self, name: str | None) -> ServedText:
        """The model called `name`, or the only one.

        Raises:
            ApiError: there is none, or it makes no text.
        """
        return self._find(self.texts, name, "text")

    def feature(self, name: str | None) -> FeatureModel:
        """The same for embeddings."""
        return self._find(self.features, name, "embeddings")

    def any(self, name: str | None) -> ServedText | FeatureModel:
        """The same for what every model has: its tokenizer."""
        models: dict[str, ServedText | FeatureModel] = {**self.texts, **self.features}
        return self._find(models, name, None)

    def _find(self, models: Mapping[str, _Model], name: str | None, what: str | None) -> _Model:
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name is not None and name in models:
            return models[name]
        if not models and what is not None:
            raise ApiError(
                404,
                f"model: nothing here makes {what}; serve a bundle that was exported with --task {_TASKS[what]}",
                param="model",
                code="model_not_found",
            )
        known, purpose = ", ".join(models), "" if what is None else f" for {what}"
        if name is None:
            raise ApiError(400, f"model: this server has several models{purpose}, name one: {known}", param="model")
        raise ApiError(
            404, f"model: no model {name!r}{purpose} here; there is: {known}", param="model", code="model_not_found"
        )


def create_app(
    served: Served,
    *,
    api_keys: Collection[bytes] = (),
    cors_origins: Collection[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    max_held_bytes: int = MAX_HELD_BYTES,
) -> FastAPI:
    """The ASGI application; engines are started with it and stopped with it.

    Args:
        served: the models.
        api_keys: who may use it; everybody where there are none.
        cors_origins: pages of which origins may use it from a browser; none but its own where there are none.
        max_body_bytes: of a request.
        max_held_bytes: of all requests together that are being received or answered.
    """
    offload = Offload()

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        for inbox in served.inboxes.values():
            inbox.attach(asyncio.get_running_loop())
        for model in served.texts.values():
            model.engine.start()
        try:
            yield
        except asyncio.CancelledError:
            pass  # by a second signal: what follows is done all the same, and nobody has to read a traceback
        finally:
            served.draining = True
            for inbox in served.inboxes.values():
                inbox.fail("the server was stopped")
            for model in served.texts.values():
                await asyncio.to_thread(model.grammars.close)
                await asyncio.to_thread(model.engine.stop, 10)
            for feature in served.features.values():
                feature.stop()
            offload.stop()

    app = FastAPI(
        title="doge-deploy",
        version=__version__,
        summary="Doge language models behind OpenAI's interface.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses={
            400: {"description": "The request is not legal; the error names the field.", "model": ErrorAnswer},
            401: {"description": "An API key is needed.", "model": ErrorAnswer},
            413: {"description": "The body is too large.", "model": ErrorAnswer},
            415: {"description": "The body is no JSON, or it is compressed.", "model": ErrorAnswer},
            500: {"description": "A fault of the model or of the server.", "model": ErrorAnswer},
        },
    )
    errors.install(app)
    _add_operations(app, served, offload)
    _add_generation(app, served, offload)
    app.add_middleware(WorkCount, served=served)
    app.add_middleware(Gate, keys=tuple(api_keys), max_body_bytes=max_body_bytes, max_held_bytes=max_held_bytes)
    app.add_middleware(Rest, busy=lambda: served.busy)
    app.add_middleware(Heads)
    if cors_origins:  # outside of the keys: a browser asks whether it may before it sends one, and reads refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestIds)
    app.openapi = lambda: _openapi(app, keys=bool(api_keys))  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, served: Served, offload: Offload) -> None:
    busy: dict[int | str, dict[str, Any]] = {
        404: {"description": "No such model.", "model": ErrorAnswer},
        429: {
            "description": "Too many requests are waiting; try again after Retry-After seconds.",
            "model": ErrorAnswer,
        },
        503: {"description": "The server is shutting down.", "model": ErrorAnswer},
    }

    def answers(model: type[BaseModel], content: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
        return {200: {"model": model, "content": content or {}}, **busy}

    async def answered(plan: Plan, form: Form, http: Request) -> Response:
        engine = plan.model.engine
        http.scope[ARRIVAL].over()
        if engine.scheduler.idle:
            tokens = sum(len(request.prompt_ids) for request in plan.requests)
            await served.arrivals.settled(tokens, engine.limits.together_tokens)
        return await answer(plan, form, served.inboxes[plan.model.name], http, offload)

    @app.post("/v1/chat/completions", responses=answers(schemas.ChatCompletion, schemas.EVENTS))
    async def chat(body: ChatBody, http: Request) -> Response:
        """The answer to a conversation, whole or as a stream of server-sent events."""
        model = served.text(body.model)
        plan = await plan_chat(body, model, new_name("chatcmpl"), offload)
        return await answered(plan, ChatForm(), http)

    @app.post("/v1/completions", responses=answers(schemas.Completion, schemas.EVENTS))
    async def completions(body: CompletionBody, http: Request) -> Response:
        """The continuation of texts or of token ids."""
        model = served.text(body.model)
        plan = await plan_completion(body, model, new_name("cmpl"), offload)
        return await answered(plan, TextForm(), http)

    @app.post("/v1/embeddings", responses=answers(schemas.Embeddings))
    async def embeddings(body: EmbeddingBody, http: Request) -> Response:
        """A vector for each text, of a bundle that was exported with `--task features`."""
        model = served.feature(body.model)
        size = model.bundle.manifest.facts.hidden_size
        if body.dimensions not in (None, size):
            said = f"dimensions: must be {size}, which this model's vectors have; not {body.dimensions}"
            raise ApiError(400, said, param="dimensions")
        given = body.texts

        def work() -> list[list[int]]:
            found = []
            for index, text in enumerate(given):
                with about(field_of("input", index, given)):
                    found.append(model.encode(text))
            return found

        texts = await offload(work, sum(map(len, given)))
        vectors = await unless_gone(model.embed_all(texts), http.receive)
        if vectors is None:
            return Response(status_code=CLOSED_REQUEST)
        tokens, form = sum(map(len, texts)), body.encoding_format
        data = [{"object": "embedding", "index": i, "embedding": encoded(one, form)} for i, one in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})


def _add_operations(app: FastAPI, served: Served, offload: Offload) -> None:
    unknown: dict[int | str, dict[str, Any]] = {404: {"description": "No such model.", "model": ErrorAnswer}}

    @app.get("/health", responses={200: {"model": schemas.Health}})
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get(
        "/ready",
        responses={
            200: {"model": schemas.Readiness},
            503: {"description": "No work is taken now.", "model": schemas.Readiness},
        },
    )
    async def ready() -> JSONResponse:
        """Whether work is taken."""
        state = "ready" if served.ready else "draining" if served.draining else "failed"
        return JSONResponse({"status": state}, 200 if served.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(served.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses={200: {"model": schemas.ModelList}})
    async def models() -> dict[str, Any]:
        """The models of this server."""
        return {"object": "list", "data": [_card(served, model) for model in _all(served)]}

    @app.get("/v1/models/{name:path}", responses={200: {"model": schemas.ModelCard}, **unknown})
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        return _card(served, served.any(name))

    @app.post("/tokenize", responses={200: {"model": schemas.Tokens}, **unknown})
    async def tokenize(body: TokenizeBody) -> Response:
        """Token ids of a text or of a conversation."""
        found = served.any(body.model)
        messages, size = conversation(body.messages or ())
        prompt = body.prompt

        def work() -> str:
            if prompt is None:
                ids = rendered(found.tokenizer, messages)
            else:
                with about("prompt"):
                    ids = found.tokenizer.ids(prompt, add_special_tokens=body.add_special_tokens)
            return tokens_json(ids, found.max_length)

        return Response(await offload(work, size if prompt is None else len(prompt)), media_type="application/json")

    @app.post("/detokenize", responses={200: {"model": schemas.Detokenized}, **unknown})
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids, special tokens included."""
        found = served.any(body.model)

        def work() -> str:
            with about("tokens"):
                found.tokenizer.check_ids(body.tokens)
            return line_of_json({"prompt": found.tokenizer.text_of(body.tokens)})

        return Response(await offload(work, len(body.tokens)), media_type="application/json")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> FileResponse:
        if name not in PAGE_PARTS:
            raise ApiError(404, f"no file {name!r}")
        return FileResponse(PAGE / name, headers=PAGE_HEADERS)


PAGE_PARTS = ("page.css", "page.js")
PAGE_HEADERS = {
    # nothing but this server's own files may run or be reached
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _all(served: Served) -> Sequence[ServedText | FeatureModel]:
    return [*served.texts.values(), *served.features.values()]


def _card(served: Served, model: ServedText | FeatureModel) -> dict[str, Any]:
    """What a client may know of a model."""
    manifest = model.bundle.manifest
    return {
        "id": model.name,
        "object": "model",
        "created": served.created,
        "owned_by": "doge-deploy",
        "max_model_len": model.max_length,
        "doge_deploy": {
            "task": manifest.task,
            "dtype": manifest.dtype,
            "checkpoint": dict(manifest.checkpoint),
            "tool": dict(manifest.tool),
            "warnings": list(manifest.warnings),
            "all_logits": isinstance(model, ServedText) and model.all_logits,
            "weights": manifest.options.quantize or manifest.options.dtype,
            "layouts": list(manifest.layouts),
            "lowered": sorted({name for layout in manifest.layouts.values() for name in layout.lowered}),
            "verified": served.verified.get(model.name),
            **served.runs_on,
        },
    }


ARRIVAL = "doge_deploy.arrival"
"""In the scope of a request for text: its `Arrival`."""

TEXT_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
WORK_PATHS = TEXT_PATHS | {"/v1/embeddings", "/tokenize", "/detokenize"}


class WorkCount:
    """Counts requests that take work, so that the server does not end before they do; takes none while it drains."""

    def __init__(self, app: Any, served: Served) -> None:
        self._app, self._served = app, served

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in WORK_PATHS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._served.draining:
            await errors.response(errors.shutting_down())(scope, receive, send)
            return
        self._served.working += 1
        if scope["path"] in TEXT_PATHS:
            scope[ARRIVAL] = self._served.arrivals.begin()
        try:
            await self._app(scope, receive, send)
        finally:
            if ARRIVAL in scope:
                scope[ARRIVAL].over()
            self._served.working -= 1


class Heads:
    """Answers HEAD as GET; what carries the answer leaves its body out."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class RequestIds:
    """Gives every answer an id, the client's own where it sent one, and writes a line into the log."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        legal = 0 < len(given) <= 128 and all(33 <= byte < 127 for byte in given)
        name = given.decode() if legal else new_name("req")
        start, status = time.perf_counter(), 0

        async def named(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception as error:  # a fault of our own, of which a client is told no more than its kind
            if status:  # the answer has begun
                raise
            _log.error("request failed", exc_info=True, extra={"fields": {"request_id": name}})
            await errors.response(errors.as_api_error(error))(scope, receive, named)
        except asyncio.CancelledError:  # the server ends, and waits no longer
            if not status:  # else the connection is closed, by which the client knows that something is missing
                await errors.response(errors.shutting_down())(scope, receive, named)
        finally:
            seconds = round(time.perf_counter() - start, 4)
            fields = {"request_id": name, "method": scope["method"], "path": quote(scope["path"])}
            _log.info("request", extra={"fields": {**fields, "status": status, "seconds": seconds}})


def _openapi(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """FastAPI's document without its own error for illegal bodies: they get 400 here; and which paths need a key."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if keys and path in OPEN_PATHS:
                    operation["security"] = []
        if keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema
