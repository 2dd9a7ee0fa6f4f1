"""Verify a bundle: open it, ask the oracle, run the cases of every layout, collect a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from doge_deploy.bundle.files import MANIFEST, sha256_file
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.config.revisions import KEEPS_ALL
from doge_deploy.errors import UsageError
from doge_deploy.graph.weight_formats import WeightFormat, format_of
from doge_deploy.options.backends import DEFAULT_BACKEND, TORCH_KERNELS
from doge_deploy.targets.backend import Backend, SessionOptions, find, loadable
from doge_deploy.verify.cases import GREEDY_STEPS
from doge_deploy.verify.environment import this_environment
from doge_deploy.verify.oracle import Oracle
from doge_deploy.verify.parity import CaseResult, Judge, make_replay, verify_layouts
from doge_deploy.verify.quality import QualityResult, judge_quality
from doge_deploy.verify.recording.oracle import open_recording
from doge_deploy.verify.report import Report
from doge_deploy.verify.runners import (
    LOWERED_LAYOUT,
    describe_lowered,
    lowered_graph,
    open_runners,
    without_spinning,
)


def verify(
    path: str | Path,
    *,
    recording: str | Path | None = None,
    reference: str | None = None,
    adapter: str | None = None,
    layouts: tuple[str, ...] = (),
    greedy_steps: int | None = None,
    portable: bool = False,
    lowering: bool = False,
    lowering_for: str | None = None,
    backend: str = DEFAULT_BACKEND,
    engine: str | None = None,
    started: Callable[[str], None] = lambda what: None,
    finished: Callable[[CaseResult], None] = lambda result: None,
) -> Report:
    """Compare a bundle with transformers, or a legacy Doge with the reference of its revision.

    Args:
        path: the bundle.
        recording: a file of `doge-deploy record`, which takes the place of the reference: torch, transformers and the
            checkpoint are not needed. Only `torch-kernels`, whose weights are the checkpoint's, still asks for them.
        reference: the checkpoint it came from; where None, what the bundle itself names (a bundled name or a Hub id).
        adapter: the PEFT adapter that was merged into it; where None, what the bundle itself names.
        layouts: which of its layouts; all where empty.
        greedy_steps: tokens of the greedy case, fewer where the bundle holds fewer; `GREEDY_STEPS` where None. A
            recording says it itself.
        portable: judge the standard graphs, not those lowered for ONNX Runtime that `generate` runs.
        lowering: judge the static graph as both TensorRT products get it (one lowering serves both), in ONNX Runtime.
        lowering_for: the name of a backend: judge its lowering on the processor, where it has that, such as `cuda` in
            ONNX Runtime's CPU provider. It takes the place of `backend`.
        backend: the name of what runs the bundle. Where it shows no selections, what is judged by them is left out, and
            said. With `torch-kernels` the model that was traced runs in PyTorch, its two operators as kernels.
        engine: which engine, where the backend has several.
        started: told what is about to be done.
        finished: told each case when it is judged.

    Raises:
        BrokenBundleError, UnsupportedModelError: bundle, checkpoint or recording is broken, or they do not belong
            together.
        UsageError: the bundle does not say where it came from and no reference was given; or options contradict each
            other.
        MissingDependencyError: torch, transformers or ONNX Runtime is missing.
    """
    if lowering_for is not None and (lowering or portable or engine is not None or backend != DEFAULT_BACKEND):
        raise UsageError(
            "--lowering-for names what is judged; leave out --lowering, --portable, --engine and --backend"
        )
    found = _on_processor(lowering_for) if lowering_for is not None else None
    bundle = open_bundle(path)
    oracle: Oracle
    if recording is None:
        from doge_deploy.verify.live import LiveOracle
        from doge_deploy.verify.source import open_reference

        checkpoint = open_reference(bundle, reference, adapter)
        runs = _kernels(checkpoint) if backend == TORCH_KERNELS else found or find(backend)
        steps = GREEDY_STEPS if greedy_steps is None else greedy_steps
        oracle = LiveOracle(bundle, checkpoint, greedy_steps=steps, started=started)
    else:
        _check_recorded(backend, reference, adapter, greedy_steps)
        oracle = open_recording(Path(recording))
        oracle.check(bundle)
        if backend == TORCH_KERNELS:
            from doge_deploy.verify.source import open_reference

            runs = _kernels(open_reference(bundle, reference, adapter))
        else:
            runs = found or find(backend)
    options = replace(without_spinning(runs), portable=portable, engine=engine)
    return judge_bundle(bundle, oracle, runs, options, layouts, lowering=lowering, started=started, finished=finished)


def _check_recorded(backend: str, reference: str | None, adapter: str | None, greedy_steps: int | None) -> None:
    """Raises UsageError where an option is given to which a recording is the answer."""
    if greedy_steps is not None:
        raise UsageError(f"--greedy-steps {greedy_steps}: a recording has its own; give it to `doge-deploy record`")
    for name, value in (("--reference", reference), ("--adapter", adapter)):
        if value is not None and backend != TORCH_KERNELS:
            raise UsageError(f"{name} {value}: --recording takes the place of the reference; leave one of them out")


def _on_processor(name: str) -> Backend[Any]:
    """The backend that runs another one's lowering on the processor.

    Raises:
        UsageError: there is no such backend, or none that does.
    """
    if (found := find(name).on_processor()) is None:
        known = [backend.name for backend in loadable() if backend.on_processor() is not None]
        raise UsageError(f"--lowering-for {name}: must be one of {', '.join(known)}")
    return found


def _kernels(checkpoint: Any) -> Backend[Any]:
    from doge_deploy.verify.torch_kernels import TorchKernels

    return TorchKernels(checkpoint)


def judge_bundle(
    bundle: Bundle,
    oracle: Oracle,
    backend: Backend[Any],
    options: SessionOptions,
    layouts: tuple[str, ...] = (),
    *,
    lowering: bool = False,
    started: Callable[[str], None] = lambda what: None,
    finished: Callable[[CaseResult], None] = lambda result: None,
) -> Report:
    """Judge a bundle by what an oracle says of it; the arguments are those of `verify`, opened.

    Raises:
        UsageError: options contradict each other or the bundle.
        UnsupportedModelError, MissingDependencyError: the backend cannot run it.
    """
    manifest = bundle.manifest
    backend.check_options(options)
    if lowering and not backend.runs_graphs:
        raise UsageError(
            f"--lowering judges a graph, and {backend.name} runs none that it is given; use {DEFAULT_BACKEND}"
        )
    chosen = _layouts(bundle, backend, layouts, lowering)
    oracle.check_layouts(bundle, chosen)
    backend.require(bundle)
    weight_format = format_of(manifest.options)
    # what rounded activations cost is judged on the graph that is served, the cases on the standard one
    rounds = weight_format is not None and weight_format.rounds_activations
    judged = replace(options, portable=True) if rounds and "portable" in backend.session_options else options
    runners = {layout: open_runners(bundle, layout, backend, judged, lowering=lowering) for layout in chosen}
    started("compare weights")
    report = Report(
        bundle.path,
        manifest.dtype,
        manifest.options.routing if manifest.facts.is_moe else None,
        oracle.name,
        oracle.weights(bundle),
        skipped=_unreachable(bundle),
        recording=oracle.description,
        bundle_sha256=sha256_file(bundle.path / MANIFEST),
        task=manifest.task,
        checkpoint=f"{manifest.checkpoint['source'] or 'a directory'}, sha256 {manifest.checkpoint['sha256']}",
        environment=this_environment(),
    )
    with oracle:
        for layout in chosen:
            what = describe_lowered(bundle, layout) if lowering else backend.runs(bundle.layout(layout), options)
            report.graphs[layout] = what if backend.name == DEFAULT_BACKEND else f"{what}, --backend {backend.name}"
        if weight_format is not None and (weight_format.rounds_inputs_to or not lowering):
            report.quality = _judge_quality(bundle, weight_format, backend, chosen, options, oracle, started)
        judges = [Judge(bundle, layout, pair, oracle) for layout, pair in runners.items()]
        oracle.prepare(judges)
        report.reference_itself = oracle.itself()
        report.results = verify_layouts(judges, oracle, started=started, finished=finished, skipped=report.skipped)
    return report


def _judge_quality(
    bundle: Bundle,
    weight_format: WeightFormat,
    backend: Backend[Any],
    layouts: Sequence[str],
    options: SessionOptions,
    oracle: Oracle,
    started: Callable[[str], None],
) -> list[QualityResult]:
    """What quantization costs in each of these layouts as it is served, by the checkpoint's own weights.

    Where engines round inputs of products too, that is the graph that they are built from.
    """
    results = []
    for name in layouts:
        layout = bundle.layout(name)
        emulated = bool(weight_format.rounds_inputs_to) and name == LOWERED_LAYOUT and backend.runs_graphs
        started(f"quality of {'the graph for engines' if emulated else backend.runs(layout, options)}")
        if emulated:
            runner = backend.open(bundle, layout, options, graph=lowered_graph(bundle, name))
        else:
            runner = backend.open(bundle, layout, options)
        replay = make_replay(bundle.manifest, name, last_logits=runner.last_logits)
        rows = oracle.held_out(name, replay, runner.max_length)
        found = judge_quality(name, weight_format.quality, runner, rows, replay)
        results.append(replace(found, emulated=emulated))
    return results


def _layouts(bundle: Bundle, backend: Backend[Any], asked: tuple[str, ...], lowering: bool) -> tuple[str, ...]:
    """The layouts to judge: those asked for, or all that the backend runs; of a lowering the one that is lowered."""
    if not lowering:
        for name in asked or (None,):
            backend.choose_layout(bundle, name)
        return asked or tuple(name for name in bundle.manifest.layouts if name in backend.layouts)
    if asked not in ((), (LOWERED_LAYOUT,)):
        raise UsageError(f"--lowering is of the {LOWERED_LAYOUT} layout, not of {', '.join(asked)}")
    bundle.layout(LOWERED_LAYOUT)
    return (LOWERED_LAYOUT,)


def _unreachable(bundle: Bundle) -> dict[str, str]:
    """Window cases that no call can reach."""
    window, capacity = bundle.manifest.facts.keep_window_size, bundle.manifest.max_length
    if window == KEEPS_ALL:  # a legacy Doge without a window has no such cases
        return {}
    lengths = {"window K=w+1": window + 1, "window K=2w": 2 * window}
    return {
        name: f"needs {length} tokens, max_length is {capacity}"
        for name, length in lengths.items()
        if length > capacity
    }
