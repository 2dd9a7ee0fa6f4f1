"""A benchmark: which candidates, then fresh processes, then rounds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import sleep
from typing import Any

from doge_deploy.bench.baselines.catalog import BASELINES, LeftOut, Wanted
from doge_deploy.bench.candidates import BUNDLE, Candidate, weights_of
from doge_deploy.bench.machine import this_machine
from doge_deploy.bench.measure import RoundTimes
from doge_deploy.bench.process import WorkerProcess
from doge_deploy.bench.report import Load, Measurements, Report, Settings, WorkloadResult
from doge_deploy.bench.roofline import buffer_bytes
from doge_deploy.bench.schedule import rotated
from doge_deploy.bench.workload import Workload
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.devices.host import usable_threads
from doge_deploy.errors import UsageError
from doge_deploy.graph.decode_traffic import bundle_traffic
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.targets.backend import SessionOptions, find
from doge_deploy.verify.source import open_reference

_SETTLE_S = 0.1
"""Pause before a section, so that threads of the one before it stop waiting for work and go to sleep. Those of ONNX
Runtime wait for a number of pause instructions, which took 35 to 62 ms on a Xeon.
"""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; the cross product of lengths and batches are the workloads."""

    prompt_lengths: tuple[int, ...] = (128,)
    past_lengths: tuple[int, ...] = (0,)
    batch_sizes: tuple[int, ...] = (1,)
    decode_steps: int = 32
    rounds: int = 8
    loads: int = 3
    threads: int | None = None
    """Those of `usable_threads` where None."""
    spins: tuple[int, ...] = ()
    """Of bundles whose backend takes it, each a candidate: see `SessionOptions`; the backend's choice where empty."""
    layouts: tuple[str, ...] = ()
    """Of every bundle; its first where empty."""
    portable: bool = False
    """The standard graph of a lowered layout too, as one more candidate."""
    backends: tuple[str, ...] = (DEFAULT_BACKEND,)
    """What runs every bundle, each as a candidate of its own."""
    against: tuple[str, ...] = ()
    """Of `BASELINES`."""
    reference: str | None = None
    roofline: bool = False
    cache: Path | None = None
    """Where what is made for baselines is kept; `default_cache()` where None."""

    def workloads(self) -> list[Workload]:
        return [
            Workload(batch, past, prompt, self.decode_steps)
            for batch in self.batch_sizes
            for past in self.past_lengths
            for prompt in self.prompt_lengths
        ]


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/doge-deploy`, or what stands for it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "doge-deploy"


def bench(
    paths: Sequence[Path],
    options: BenchOptions,
    *,
    argv: Sequence[str] = (),
    started: Callable[[str], None] = lambda what: None,
    finished: Callable[[Report, WorkloadResult], None] = lambda report, result: None,
) -> Report:
    """Time bundles, and their baselines, in turns.

    Every candidate lives in a process of its own. For load time and memory these are fresh ones, `loads` per
    candidate and workload, one alive at a time. For speed all are alive and take turns, one section at a time, in an
    order that is rotated every round.

    Args:
        paths: bundles of one checkpoint (of any, where there are no baselines); others are compared with the first.
        options: what to measure.
        argv: the command line, for the report.
        started: told what is about to be done.
        finished: told each workload when it is done.

    Raises:
        UsageError: a workload does not fit into a bundle, or the checkpoint of baselines is not known.
        UnsupportedModelError: a bundle or the checkpoint is broken, or a process died.
        MissingDependencyError: a package is missing.
    """
    opened = [open_bundle(path) for path in paths]
    bundles = _bundle_candidates(opened, options)
    _check_lengths(list(bundles), options.workloads())
    threads = usable_threads(options.threads)
    baselines, left_out = _baselines(opened, options, threads, started) if options.against else ([], {})
    candidates = [*bundles, *baselines]
    settings = Settings(threads, options.rounds, options.loads, tuple(argv))
    report = Report(this_machine(), settings, candidates, left_out=left_out)
    for workload in options.workloads():
        result = WorkloadResult(workload, [_empty(candidate, workload) for candidate in candidates])
        for candidate, bundle in bundles.items():
            result.of(candidate.name).traffic = bundle_traffic(
                bundle,
                bundle.layout(candidate.layout),
                batch_size=workload.batch_size,
                keys=workload.decode_lengths[workload.decode_steps // 2],
            )
        taking_part = [candidate for candidate in candidates if result.of(candidate.name).not_measured is None]
        _measure_loads(taking_part, result, options.loads, threads, started)
        _measure_rounds(taking_part, result, options, report, started)
        report.results.append(result)
        finished(report, result)
    return report


def _bundle_candidates(bundles: Sequence[Bundle], options: BenchOptions) -> dict[Candidate, Bundle]:
    """One per bundle and graph; where two bundles have a name in common, by their whole path."""
    names = [bundle.path.resolve().name for bundle in bundles]
    unique = len(set(names)) == len(names)
    candidates: dict[Candidate, Bundle] = {}
    for bundle, name in zip(bundles, names, strict=True):
        manifest = bundle.manifest
        graphs = list(_graphs(bundle, options))
        layouts_of = {backend: {one[1] for one in graphs if one[0] == backend} for backend in options.backends}
        for (backend, layout, portable), spin in _with_spins(graphs, options):
            parts = [
                name if unique else str(bundle.path),
                *([layout] if len(layouts_of[backend]) > 1 else []),
                *(["portable"] if portable else []),
                *([backend] if backend != DEFAULT_BACKEND else []),
                *([f"spin {spin}"] if spin is not None else []),
            ]
            candidate = Candidate(
                name=" ".join(parts),
                kind=BUNDLE,
                path=str(bundle.path),
                dtype=manifest.dtype,
                max_length=manifest.max_length,
                vocab_size=manifest.facts.vocab_size,
                layout=layout,
                portable=portable,
                backend=backend,
                last_logits=manifest.last_logits,
                spin=spin,
                weights=weights_of(bundle),
            )
            if candidate in candidates:
                raise UsageError(f"{candidate.name} is named twice")
            candidates[candidate] = bundle
    return candidates


def _with_spins(
    graphs: Sequence[tuple[str, str, bool]], options: BenchOptions
) -> Iterator[tuple[tuple[str, str, bool], int | None]]:
    """Each graph with each number of microseconds that was asked for, where its backend takes one."""
    for graph in graphs:
        takes = "spin" in find(graph[0]).session_options
        for spin in (options.spins if takes else ()) or (None,):
            yield graph, spin


def _graphs(bundle: Bundle, options: BenchOptions) -> Iterator[tuple[str, str, bool]]:
    """Backend, layout, and whether the layout's standard graph is meant where there is another one.

    Raises:
        UsageError: there is no such layout, or the bundle has nothing for a backend to run.
    """
    for name in options.backends:
        backend = find(name)
        backend.require(bundle)
        asked: Sequence[str | None] = [one for one in options.layouts if one in backend.layouts] or options.layouts[:1]
        for layout in asked or (None,):
            chosen = backend.choose_layout(bundle, layout)
            yield name, chosen.signature.layout, False
            both = options.portable and "portable" in backend.session_options
            if both and backend.runs(chosen, SessionOptions(portable=True)) != backend.runs(chosen, SessionOptions()):
                yield name, chosen.signature.layout, True


def _check_lengths(candidates: Sequence[Candidate], workloads: Sequence[Workload]) -> None:
    for candidate in candidates:
        for workload in workloads:
            if workload.total_length > candidate.max_length:
                raise UsageError(
                    f"{workload.name} and its decode steps need {workload.total_length} tokens, but the max_length of "
                    f"{candidate.path} is {candidate.max_length}: ask for shorter ones"
                )


def _empty(candidate: Candidate, workload: Workload) -> Measurements:
    reason = None
    if workload.total_length > candidate.max_length:
        reason = f"right for at most {candidate.max_length} tokens, needs {workload.total_length}"
    elif candidate.rows is not None and workload.batch_size > candidate.rows:
        reason = f"takes at most {candidate.rows} row at once, the workload has {workload.batch_size}"
    return Measurements(candidate.name, not_measured=reason)


def _baselines(
    bundles: Sequence[Bundle], options: BenchOptions, threads: int, started: Callable[[str], None]
) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates of the baselines that were asked for, and why others of them are left out, by name."""
    if len(others := {bundle.manifest.checkpoint["sha256"] for bundle in bundles}) > 1:
        raise UsageError(f"--against needs bundles of one checkpoint; these come from {len(others)}")
    checkpoint = open_reference(bundles[0], options.reference)

    def make(module: str, request: dict[str, Any]) -> None:
        with WorkerProcess(threads) as process:
            process.ask("make", module=module, request=request)

    wanted = Wanted(bundles, checkpoint, options.workloads(), options.cache or default_cache(), make, started)
    candidates: list[Candidate] = []
    left_out: dict[str, str] = {}
    for name in options.against:
        baseline = BASELINES[name]
        try:
            baseline.require()
            if baseline.loads_checkpoint:
                _check_loadable(checkpoint)
            candidates += baseline.load().candidates(wanted)
        except LeftOut as reason:
            left_out[name] = str(reason)
    return candidates, left_out


def _check_loadable(checkpoint: Checkpoint) -> None:
    """Raises UsageError where transformers would not read the checkpoint as `export` did."""
    if checkpoint.facts.is_legacy:
        revision = checkpoint.facts.revision
        raise UsageError(f"--against: transformers cannot run {checkpoint.path}, a checkpoint of the {revision} code")
    if not checkpoint.as_stored:
        raise UsageError(
            f"--against: baselines load {checkpoint.path} with transformers, which does not read it as the bundle's "
            "export did (an adapter, names of a wrapper, or an index without metadata)"
        )


def _measure_loads(
    candidates: Sequence[Candidate],
    result: WorkloadResult,
    loads: int,
    threads: int,
    started: Callable[[str], None],
) -> None:
    """Fresh processes, one alive at a time."""
    for number in range(loads):
        for candidate in rotated(candidates, number):
            started(f"{result.workload.name}: load {candidate.name} in a new process, {number + 1} of {loads}")
            with WorkerProcess(threads) as process:
                loaded = process.ask("load", candidate=asdict(candidate), threads=threads)
                ready_ns = process.age_ns()
                first = process.ask("first", workload=asdict(result.workload))
                memory = process.ask("memory")
            result.of(candidate.name).loads.append(
                Load(
                    ready_ns=ready_ns,
                    first_prefill_ns=first["prefill_ns"],
                    first_decode_ns=first["decode_ns"],
                    **loaded,
                    **memory,
                )
            )


def _measure_rounds(
    candidates: Sequence[Candidate],
    result: WorkloadResult,
    options: BenchOptions,
    report: Report,
    started: Callable[[str], None],
) -> None:
    """All alive, one timed at a time; the probe of bandwidth and products is one more that takes turns."""
    threads, workload = report.settings.threads, asdict(result.workload)
    with contextlib.ExitStack() as stack:
        processes: dict[str | None, WorkerProcess] = {}
        for candidate in candidates:
            started(f"{result.workload.name}: load {candidate.name}")
            process = processes[candidate.name] = stack.enter_context(WorkerProcess(threads))
            process.ask("load", candidate=asdict(candidate), threads=threads)
            result.of(candidate.name).tokens = process.ask("first", workload=workload)["tokens"]
        if options.roofline:
            probe = processes[None] = stack.enter_context(WorkerProcess(1))
            nbytes = buffer_bytes(report.machine.last_level_cache_bytes)
            result.probe_bytes = probe.ask("probe", threads=threads, nbytes=nbytes)["nbytes"]
            products = stack.enter_context(WorkerProcess(threads))
        for number in range(options.rounds):
            started(f"{result.workload.name}: round {number + 1} of {options.rounds}")
            for name in rotated(list(processes), number):
                sleep(_SETTLE_S)
                if name is None:
                    result.sweeps_ns.append(processes[name].ask("sweep")["sweeps_ns"])
                    sleep(_SETTLE_S)
                    result.products_ns.append(products.ask("multiply", threads=threads)["products_ns"])
                else:
                    answer = processes[name].ask("round", workload=workload)
                    result.of(name).rounds.append(RoundTimes(**answer))
