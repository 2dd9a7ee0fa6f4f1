"""Verify a bundle: open both sides, run the cases of every layout, collect a report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.config.model import DogeFacts
from doge_deploy.config.revisions import KEEPS_ALL
from doge_deploy.errors import MismatchError, UsageError
from doge_deploy.graph.passes.expose_selections import ExposeSelectionsPass
from doge_deploy.graph.schemas import CDMOE, DYNAMIC_MASK_ATTENTION, ROUTED_EXPERTS, WINDOW_BIAS
from doge_deploy.graph.weight_formats import Quality, format_of
from doge_deploy.options.backends import DEFAULT_BACKEND, TORCH_KERNELS
from doge_deploy.runtime.base import IntArray
from doge_deploy.runtime.tokenizer import TOKENIZER_FILE, Tokenizer
from doge_deploy.targets.backend import Backend, SessionOptions, find
from doge_deploy.verify.cases import Call, Case, Limits, chunk, distinct_ids, repeating_ids
from doge_deploy.verify.held_out import HELD_OUT
from doge_deploy.verify.parity import CaseResult, References, Runners, make_replay, verify_layouts
from doge_deploy.verify.quality import QualityResult, judge_quality, stored_weights
from doge_deploy.verify.reference import Reference, few_threads
from doge_deploy.verify.replay import Replay
from doge_deploy.verify.source import open_reference
from doge_deploy.verify.tolerance import WIDER
from doge_deploy.verify.torch_kernels import TorchKernels
from doge_deploy.verify.weights import WeightsResult, compare_weights

TEXT = (
    "A dynamic mask keeps the keys that matter. Every key carries a score, and the score depends on the key alone, "
    "so the score can be kept beside the key. When there are more keys than the window holds, the keys with the best "
    "scores stay and the other keys are dropped; a key that was dropped never comes back. The window is a promise "
    "about memory, and the score is a promise about attention. Keep the window, keep the score, and keep the promise."
)
"""Natural text with its repetitions, for bundles that have a tokenizer."""

LOWERED_LAYOUT = "static"
"""The layout that engines are built from."""


@dataclass
class SelfDifference:
    """How far transformers is from itself when the same text comes in other calls."""

    prefill_against_decode: float
    """Largest absolute difference of logits."""
    scale: float
    """Largest absolute logit."""


@dataclass
class Report:
    """Everything that was found."""

    bundle: Path
    dtype: str
    routing: str | None
    """None for a dense model."""
    reference: str
    """What the bundle was compared with, for people."""
    weights: WeightsResult
    results: list[CaseResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Cases that the bundle cannot hold, with the reason."""
    reference_itself: SelfDifference | None = None
    graphs: dict[str, str] = field(default_factory=dict)
    """Per layout the file that was run."""
    quality: list[QualityResult] = field(default_factory=list)
    """Of a bundle with quantized weights: what the rounding costs, on the graphs that were run.

    The cases are then those of the standard graph, against a reference with the same dequantized weights.
    """

    @property
    def failed_cases(self) -> list[str]:
        """`weights`, and `<layout>/<case>`."""
        failed = [] if self.weights.passed else ["weights"]
        failed += [f"{result.layout}/{result.case}" for result in self.results if not result.passed]
        return failed + [f"{result.layout}/quality" for result in self.quality if not result.passed]

    @property
    def passed(self) -> bool:
        return bool(self.results) and not self.failed_cases

    def require_passed(self) -> None:
        """Raises MismatchError with the names of the cases that failed, where `passed` is false."""
        if not self.passed:
            failed = ", ".join(self.failed_cases)
            raise MismatchError(f"{self.bundle} does not compute what {self.reference} computes: {failed}")


def verify(
    path: str | Path,
    *,
    reference: str | None = None,
    adapter: str | None = None,
    layouts: tuple[str, ...] = (),
    greedy_steps: int = 128,
    portable: bool = False,
    lowering: bool = False,
    backend: str = DEFAULT_BACKEND,
    engine: str | None = None,
    started: Callable[[str], None] = lambda what: None,
    finished: Callable[[CaseResult], None] = lambda result: None,
) -> Report:
    """Compare a bundle with transformers, or a legacy Doge with the reference of its revision.

    Args:
        path: the bundle.
        reference: the checkpoint it came from; where None, what the bundle itself names (a bundled name or a Hub id).
        adapter: the PEFT adapter that was merged into it; where None, what the bundle itself names.
        layouts: which of its layouts; all where empty.
        greedy_steps: tokens of the greedy case, fewer where the bundle holds fewer.
        portable: judge the standard graphs, not those lowered for ONNX Runtime that `generate` runs.
        lowering: judge the static graph as both TensorRT products get it (one lowering serves both), in ONNX Runtime.
        backend: the name of what runs the bundle. Where it shows no selections, what is judged by them is left out, and
            said. With `torch-kernels` the model that was traced runs in PyTorch, its two operators as kernels.
        engine: which engine, where the backend has several.
        started: told what is about to be done.
        finished: told each case when it is judged.

    Raises:
        BrokenBundleError, UnsupportedModelError: bundle or checkpoint is broken, or they do not belong together.
        UsageError: the bundle does not say where it came from and no reference was given.
        MissingDependencyError: torch, transformers or ONNX Runtime is missing.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    checkpoint = open_reference(bundle, reference, adapter)
    runs = TorchKernels(checkpoint) if backend == TORCH_KERNELS else find(backend)
    served = replace(_without_spinning(runs), portable=portable, engine=engine)
    runs.check_options(served)
    if lowering and not runs.runs_graphs:
        raise UsageError(f"--lowering judges a graph, and {backend} runs none that it is given; use {DEFAULT_BACKEND}")
    chosen = _layouts(bundle, runs, layouts, lowering)
    runs.require(bundle)
    weight_format = format_of(manifest.options)
    # what rounded activations cost is judged on the graph that is served, the cases on the standard one
    rounds = weight_format is not None and weight_format.rounds_activations
    judged = replace(served, portable=True) if rounds and "portable" in runs.session_options else served
    runners = {layout: open_runners(bundle, layout, runs, judged, lowering=lowering) for layout in chosen}
    started("compare weights")
    report = Report(
        bundle.path,
        manifest.dtype,
        manifest.options.routing if manifest.facts.is_moe else None,
        _reference_name(manifest.facts),
        compare_weights(bundle, checkpoint),
        skipped=_unreachable(bundle),
    )
    stored = {} if weight_format is None else stored_weights(bundle, checkpoint, weight_format)
    with few_threads(checkpoint):
        for layout in chosen:
            what = describe_lowered(bundle, layout) if lowering else runs.runs(bundle.layout(layout), served)
            report.graphs[layout] = what if backend == DEFAULT_BACKEND else f"{what}, --backend {backend}"
        if weight_format is not None and not lowering:
            started("load the reference")
            exact = Reference(checkpoint, manifest.dtype, manifest.task)
            report.quality = _judge_quality(bundle, weight_format.quality, runs, chosen, served, exact, started)
        started("load the reference")
        dtypes = (manifest.dtype, WIDER[manifest.dtype])
        same, wider = (Reference(checkpoint, dtype, manifest.task, stored) for dtype in dtypes)
        references = References(same, wider)
        if manifest.task == "causal-lm":
            report.reference_itself = compare_reference_with_itself(bundle, references.same)
        report.results = verify_layouts(
            bundle,
            runners,
            references,
            text_ids=_text_ids(bundle),
            greedy_steps=greedy_steps,
            started=started,
            finished=finished,
            skipped=report.skipped,
        )
    return report


def _reference_name(facts: DogeFacts) -> str:
    return f"the reference of legacy Doges ({facts.revision})" if facts.is_legacy else "transformers"


def _judge_quality(
    bundle: Bundle,
    limits: Quality,
    backend: Backend[Any],
    layouts: Sequence[str],
    options: SessionOptions,
    reference: Reference,
    started: Callable[[str], None],
) -> list[QualityResult]:
    """What quantization costs in each of these layouts as it is served, by the checkpoint's own weights."""
    results = []
    text_ids = _text_ids(bundle, HELD_OUT)
    for name in layouts:
        layout = bundle.layout(name)
        started(f"quality of {backend.runs(layout, options)}")
        runner = backend.open(bundle, layout, options)
        replay = make_replay(bundle.manifest, name, last_logits=runner.last_logits)
        results.append(judge_quality(name, limits, runner, reference, replay, text_ids))
    return results


def _without_spinning(backend: Backend[Any]) -> SessionOptions:
    """Options for runners that take turns with torch, whose threads would wait for those that spin."""
    return SessionOptions(spin=0) if "spin" in backend.session_options else SessionOptions()


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


def describe_lowered(bundle: Bundle, layout: str) -> str:
    """What is judged where a lowering is: its hash, and the engines that were built from the same graph."""
    digest = hashlib.sha256(_lowered(ir.load(bundle.path / bundle.layout(layout).file))).hexdigest()
    built = [name for name, record in bundle.manifest.engines.items() if record.lowered_onnx_sha256 == digest]
    of = f", that of {', '.join(built)}" if built else ""
    return f"{bundle.layout(layout).file} lowered for TensorRT (sha256 {digest[:12]}...{of})"


def _lowered(model: ir.Model) -> bytes:
    from doge_deploy.targets.trt.lowering import lower

    data: bytes = ir.to_proto(lower(model)).SerializeToString()
    return data


def open_runners(
    bundle: Bundle,
    layout: str,
    backend: Backend[Any] | None = None,
    options: SessionOptions | None = None,
    *,
    lowering: bool = False,
) -> Runners:
    """The layout as the backend runs it, and with its selections exposed where it has any that can be shown.

    Args:
        bundle: an opened bundle.
        layout: of the bundle.
        backend: the default one where None.
        options: of both; the defaults where None, without threads that spin.
        lowering: run the standard graph as it is lowered for TensorRT; only in a backend that runs graphs.
    """
    backend = find(DEFAULT_BACKEND) if backend is None else backend
    options = _without_spinning(backend) if options is None else options
    chosen = bundle.layout(layout)
    rewrite = _lowered if lowering else lambda model: ir.to_proto(model).SerializeToString()
    source = bundle.path / (chosen.file if lowering else backend.runs(chosen, options))
    plain = backend.open(bundle, chosen, options, graph=rewrite(ir.load(source)) if lowering else None)
    operators = [DYNAMIC_MASK_ATTENTION, WINDOW_BIAS] if chosen.keep_window else []
    operators += [CDMOE, ROUTED_EXPERTS] if bundle.manifest.facts.is_moe else []
    if not operators:
        return Runners(plain, None, backend=backend)
    if not backend.shows_selections:
        return Runners(plain, None, hides_selections=True, backend=backend)
    if not backend.runs_graphs:
        return Runners(plain, plain, backend=backend)
    model = ExposeSelectionsPass(operators)(ir.load(source)).model
    return Runners(plain, backend.open(bundle, chosen, options, graph=rewrite(model)), backend=backend)


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


def _text_ids(bundle: Bundle, text: str = TEXT) -> IntArray:
    """Natural text: through the bundle's tokenizer, or random ids with as many repetitions.

    Raises:
        BrokenBundleError: a file of the tokenizer is broken.
    """
    facts = bundle.manifest.facts
    if TOKENIZER_FILE in bundle.manifest.files:
        ids = Tokenizer.from_directory(bundle.path).encode(text)
        if ids and max(ids) < facts.vocab_size:
            return np.asarray(ids, np.int64)
    return repeating_ids(Limits.of(facts, bundle.manifest.max_length), 256)


def compare_reference_with_itself(bundle: Bundle, reference: Reference) -> SelfDifference:
    """The same row in one call and token by token, both in transformers."""
    manifest = bundle.manifest
    limits = Limits.of(manifest.facts, manifest.max_length)
    row = distinct_ids(limits, min(24, limits.max_length), seed=0)
    replay = Replay(padding="right", tokenwise=False, last_logits=False)
    whole: tuple[Call, ...] = chunk([row], [[len(row)]])
    single = chunk([row], [[1]] * len(row))
    a = np.concatenate(replay.run(reference, Case("prefill", whole, exact=True)).logits)
    b = np.concatenate(replay.run(reference, Case("decode", single, exact=True)).logits)
    return SelfDifference(float(np.abs(a - b).max()), float(np.abs(a).max()))
