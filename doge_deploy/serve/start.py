"""From bundles to a server that runs: everything is opened, checked and warmed up before a port is bound."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import re
import signal
import socket
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.errors import MissingDependencyError, UsageError
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.runtime.memory import check_slots
from doge_deploy.runtime.slots import SlotRunner, open_slots
from doge_deploy.runtime.speculation import DRAFTS, exact_length
from doge_deploy.serve.heap import share_one_heap
from doge_deploy.serve.scheduler import Limits, Scheduler

if TYPE_CHECKING:
    import uvicorn

    from doge_deploy.serve.engine import Deliver
    from doge_deploy.serve.http.app import Served
    from doge_deploy.serve.model import ServedText
    from doge_deploy.verify.report import Report

DEFAULT_SLOTS = 8

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
"""As a browser sends it: small letters, and no path, not even a slash."""

_FLUSH_SECONDS = 5.0
"""How long streams have to send their last event when the time to drain is over."""

_OTHER_FILES = 256
"""Files that are open beside connections, with room to spare."""

_log = logging.getLogger("doge_deploy.serve")


def is_loopback(host: str) -> bool:
    """Whether an address or `localhost` can be reached from this machine alone; other names are not looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


@dataclass(frozen=True)
class ServeOptions:
    """How bundles are served.

    Raises:
        UsageError: a value is not legal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = DEFAULT_SLOTS
    """Texts that are made at once."""
    backend: str = DEFAULT_BACKEND
    engine: str | None = None
    threads: int | None = None
    """Of the backend; see `doge_deploy.devices.host.usable_threads`."""
    spin: int | None = None
    """Microseconds that an idle thread of the backend waits for work; its own choice where None."""
    speculate: bool = True
    """Guess tokens from the text where that is exact and pays."""
    names: tuple[str, ...] = ()
    """What clients call the bundles, in their order; their own names where there are none."""
    api_key_file: Path | None = None
    no_auth: bool = False
    """Serve other machines without a key."""
    cors_origins: tuple[str, ...] = ()
    """Pages of which origins may use the server from a browser; `*` is any. None but its own where there are none."""
    recordings: tuple[Path, ...] = ()
    """Files of `doge-deploy record` by which the bundles are judged before they are served, in their order; none where
    they are not judged."""
    drain_seconds: float = 30.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UsageError(f"--port {self.port}: must be 0 (any free one) to 65535")
        try:
            self.host.encode("idna")  # as it is done to look it up
        except UnicodeError as error:
            raise UsageError(f"--host {self.host!a}: is no name of a host: {error.__cause__ or error}") from error
        for name in self.names:
            if not name.strip():
                raise UsageError(f"--served-model-name {name!r}: must hold more than blanks")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise UsageError(f"--cors-origin {origin}: must be * or an origin such as https://example.org:8443")
        if self.drain_seconds < 0:
            raise UsageError(f"--drain-seconds {self.drain_seconds}: must be at least 0")
        if not is_loopback(self.host) and self.api_key_file is None and not self.no_auth:
            raise UsageError(
                f"--host {self.host} can be reached from other machines: give --api-key-file FILE, or --no-auth to "
                "serve everybody"
            )


def require_server() -> None:
    """Raises MissingDependencyError where a package of the server is not installed."""
    import importlib.util

    for name in ("fastapi", "uvicorn", "httptools", "prometheus_client", "llguidance"):
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"serve needs {name}, which is not installed: pip install 'doge-deploy[serve]'"
            )


def model_name(bundle: Bundle) -> str:
    """What a bundle is called where nobody says: the id of its checkpoint, else its folder."""
    source = bundle.manifest.checkpoint.get("source")
    return str(source) if source else bundle.path.resolve().name


def judge(paths: Sequence[Path], options: ServeOptions) -> list[Report]:
    """Compare what is going to be served with recordings of the reference: a report for each bundle, all of them
    passed; none where there are no recordings.

    Raises:
        MismatchError: a bundle computes something else in this backend.
        UsageError: not one recording for each bundle.
        UnsupportedModelError, BrokenBundleError, MissingDependencyError: it cannot be judged.
    """
    if not options.recordings:
        return []
    if len(options.recordings) != len(paths):
        raise UsageError(
            f"{len(options.recordings)} recordings for {len(paths)} bundles: give --verify-on-start once for each"
        )
    from doge_deploy.verify.run import verify

    reports = []
    for path, recording in zip(paths, options.recordings, strict=True):
        task = open_bundle(path, check="quick").manifest.task
        layouts = ("static",) if task == "causal-lm" else ()
        report = verify(path, recording=recording, layouts=layouts, backend=options.backend, engine=options.engine)
        report.require_passed()
        fields = {"bundle": str(path), "cases": len(report.results), "recording": str(recording)}
        _log.info("verified", extra={"fields": fields})
        reports.append(report)
    return reports


def summary(report: Report) -> dict[str, Any]:
    """Of a report that passed: what was judged by what, and the share of its tolerance that each case used."""
    return {
        "bundle": str(report.bundle),
        "bundle_sha256": report.bundle_sha256,
        "recording": report.recording,
        "verdict": report.verdict,
        "graphs": dict(report.graphs),
        "cases": [{"case": one.case, "layout": one.layout, "load": one.load} for one in report.results],
        "skipped": dict(report.skipped),
    }


def open_served(paths: Sequence[Path], options: ServeOptions) -> Served:
    """Open every bundle, with its engine ready to be started.

    Raises:
        UsageError, UnsupportedModelError, BrokenBundleError, MissingDependencyError: one of them cannot be served.
    """
    # Of several bundles, one would be hashed while the steps of another are timed.
    bundles = [open_bundle(path, wait=len(paths) > 1) for path in paths]
    if options.backend == DEFAULT_BACKEND:  # others have memory of their own
        check_slots(bundles, options.slots)
    with contextlib.ExitStack() as checks:
        for bundle in bundles:
            checks.enter_context(bundle.damage_first())
        served = _open_served(bundles, options)
        for bundle in bundles:
            bundle.prove()
    return served


def _open_served(bundles: Sequence[Bundle], options: ServeOptions) -> Served:
    """What `open_served` gives, of bundles whose files may still be checked until their runners are open."""
    from doge_deploy.runtime.backend import open_backend
    from doge_deploy.serve.http.app import Served
    from doge_deploy.serve.http.embeddings import FeatureModel
    from doge_deploy.serve.http.inbox import Inbox
    from doge_deploy.serve.http.metrics import Metrics

    names = list(options.names) or [model_name(bundle) for bundle in bundles]
    if len(names) != len(bundles):
        raise UsageError(f"{len(names)} names for {len(bundles)} bundles: give --served-model-name once for each")
    if twice := next((name for index, name in enumerate(names) if name in names[:index]), None):
        raise UsageError(f"two bundles are called {twice!r}: give each its own --served-model-name")
    texts, features, inboxes, metrics = {}, {}, {}, Metrics()
    for name, bundle in zip(names, bundles, strict=True):
        task = bundle.manifest.task
        if task == "features":
            runner = open_backend(
                bundle, options.backend, threads=options.threads, spin=options.spin, engine=options.engine
            )
            features[name] = FeatureModel(name, bundle, runner, options.limits.queue_requests)
            metrics.watch_features(name, features[name])
            continue
        if task != "causal-lm":
            raise UsageError(f"{bundle.path} is a bundle for task={task}; causal-lm and features can be served")
        inboxes[name] = Inbox(name, metrics)
        texts[name] = open_text(bundle, name, options, inboxes[name].deliver)
        metrics.watch(name, texts[name].engine.scheduler)
    runs_on = {"backend": options.backend, "engine": options.engine, "threads": options.threads}
    return Served(texts, features, metrics, inboxes, runs_on=runs_on, names=tuple(names))


def open_text(bundle: Bundle, name: str, options: ServeOptions, deliver: Deliver) -> ServedText:
    """A bundle for text with its engine, ready to be started.

    Args:
        bundle: of task causal-lm.
        name: what clients call it.
        options: those of slots, backend, threads and scheduler are looked at.
        deliver: gets the events of the engine.

    Raises:
        UsageError, UnsupportedModelError, BrokenBundleError, MissingDependencyError: it cannot be served.
    """
    from doge_deploy.serve.engine import Engine
    from doge_deploy.serve.model import ServedText

    slots = open_slots(
        bundle,
        options.slots,
        options.backend,
        threads=options.threads,
        spin=options.spin,
        engine=options.engine,
        flush_denormals=True,
    )
    warm_up(slots, options.limits)
    scheduler = make_scheduler(bundle, slots, options.limits, speculate=options.speculate)
    return ServedText(name, bundle, Engine(scheduler, deliver), all_logits=slots.all_logits)


def warm_up(slots: SlotRunner, limits: Limits) -> None:
    """Take the memory of all slots and make the largest calls once: what is done the first time only must not be what a
    client waits for, and memory that is not there is missed before anybody is served.
    """
    slots.take_memory()
    used = [slots.acquire() for _ in range(slots.slots)]
    width = min(limits.alone_tokens, slots.max_length)
    slots.prefill(used[0], [0] * width).numpy()
    slots.truncate(used[0], 0)
    each = [max(min(limits.together_tokens, width) // len(used), 1)] * len(used)
    if len(used) > 1 and slots.joins(each):
        slots.extend(used, [[0] * count for count in each]).numpy()
    for slot in used:
        slots.release(slot)


def make_scheduler(bundle: Bundle, slots: SlotRunner, limits: Limits, *, speculate: bool = True) -> Scheduler:
    """A scheduler that guesses where that is asked for, exact and pays."""
    costs = measure_step_costs(slots) if speculate and slots.all_logits and not slots.whole_prompts else None
    return Scheduler(slots, limits, costs, exact_length(bundle.manifest))


def measure_step_costs(slots: SlotRunner, rounds: int = 7) -> dict[int, float]:
    """Time of a call of Q tokens over that of one token, by Q: medians of a few calls on an empty slot, interleaved."""
    widths = [width for width in (1, *(length + 1 for length in DRAFTS)) if width <= slots.max_length]
    slot = slots.acquire()
    times: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(rounds):
        for width in widths:
            slots.truncate(slot, 0)
            start = perf_counter()
            slots.extend([slot], [[0] * width], width).numpy()
            times[width].append(perf_counter() - start)
    slots.release(slot)
    one = statistics.median(times[1])
    return {width: statistics.median(found) / one for width, found in times.items()}


def run(paths: Sequence[Path], options: ServeOptions) -> None:
    """Serve until a signal ends it.

    Raises:
        UsageError, UnsupportedModelError, BrokenBundleError, MissingDependencyError: nothing was served.
        MismatchError: nothing was served, since a bundle does not compute what its recording holds.
    """
    require_server()
    share_one_heap()
    import uvicorn

    from doge_deploy.serve.http.app import create_app
    from doge_deploy.serve.http.connections import Patience, patient, raise_file_limit
    from doge_deploy.serve.http.security import read_keys

    keys = read_keys(options.api_key_file) if options.api_key_file is not None else ()
    reports = judge(paths, options)
    served = open_served(paths, options)
    if reports:
        served.verified = {name: summary(report) for name, report in zip(served.names, reports, strict=True)}
    app = create_app(served, api_keys=keys, cors_origins=options.cors_origins)
    # beside connections there are files of libraries, and sockets that wait to be closed
    files = raise_file_limit(Patience().connections + _OTHER_FILES)
    config = uvicorn.Config(
        app,
        http=patient(Patience(connections=max(files - _OTHER_FILES, 1))),
        ws="none",
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=2,
        timeout_keep_alive=75,
    )
    server = _make_server(config, served, options.drain_seconds)
    gc.collect()
    gc.freeze()  # what is there now stays: to look through it again and again would hold up every stream
    refusal, log = _Refusal(), logging.getLogger("uvicorn.error")
    log.addFilter(refusal)
    try:
        with contextlib.suppress(SystemExit):  # uvicorn's way to say that it could not start
            server.run()
    finally:
        log.removeFilter(refusal)
    if not server.started:
        raise UsageError(f"--host {options.host} --port {options.port}: cannot be bound{refusal.reason}")


class _Refusal(logging.Filter):
    """Why an address cannot be bound. It is kept out of the log: `serve` says it itself."""

    reason = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.msg, OSError):
            return True
        if isinstance(record.msg, socket.gaierror):  # whose numbers are not those of the system
            why = "no address is known for this host's name"
        elif record.msg.errno == errno.EADDRINUSE:
            why = "another program listens there; choose another --port"
        else:
            why = os.strerror(record.msg.errno or 0)
        self.reason = f": {why}"
        return False


def _make_server(config: uvicorn.Config, served: Served, drain_seconds: float) -> uvicorn.Server:
    """A server that finishes what runs before it ends."""
    import uvicorn

    class DrainingServer(uvicorn.Server):
        """The first signal drains, the second ends at once."""

        _draining: asyncio.Task[None] | None = None

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            kinds = (signal.SIGTERM, signal.SIGINT)
            before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
            try:
                yield
            finally:
                for kind, handler in before.items():
                    signal.signal(kind, handler or signal.SIG_DFL)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if served.draining or not self.started:
                self.should_exit = self.force_exit = True
                return
            served.draining = True
            loop = asyncio.get_event_loop_policy().get_event_loop() if frame is None else self._loop
            loop.call_soon_threadsafe(self._begin_to_drain)

        def _begin_to_drain(self) -> None:
            self._draining = asyncio.ensure_future(self._drain())

        async def _drain(self) -> None:
            _log.info("draining", extra={"fields": {"seconds": drain_seconds}})
            deadline = perf_counter() + drain_seconds
            while served.working and perf_counter() < deadline:
                await asyncio.sleep(0.05)
            for inbox in served.inboxes.values():
                inbox.fail("the server is shutting down")
            for text in served.texts.values():
                await asyncio.to_thread(text.grammars.close)
            for model in served.features.values():
                model.stop()
            deadline = perf_counter() + _FLUSH_SECONDS
            while served.working and perf_counter() < deadline:
                await asyncio.sleep(0.05)
            self.should_exit = True

        async def startup(self, sockets: object = None) -> None:
            self._loop = asyncio.get_running_loop()
            await super().startup(sockets)  # type: ignore[arg-type]
            if self.started:
                address = self.servers[0].sockets[0].getsockname()
                host = f"[{address[0]}]" if ":" in address[0] else address[0]
                names = ", ".join(served.names)
                _log.info("serving", extra={"fields": {"address": f"http://{host}:{address[1]}", "models": names}})

    return DrainingServer(config)
