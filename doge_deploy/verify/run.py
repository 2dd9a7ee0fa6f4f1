"""Verify a bundle: open both sides, run the cases of every layout, collect a report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from doge_deploy.bundle.manifest import Bundle, open_bundle
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.config.model import DogeFacts
from doge_deploy.config.revisions import KEEPS_ALL
from doge_deploy.errors import MismatchError, UsageError
from doge_deploy.graph.passes.expose_selections import ExposeSelectionsPass
from doge_deploy.graph.passes.quantize_weights import scheme_of
from doge_deploy.graph.schemas import CDMOE, DYNAMIC_MASK_ATTENTION, ROUTED_EXPERTS, WINDOW_BIAS
from doge_deploy.options.backends import TORCH_KERNELS, Backend
from doge_deploy.runtime.backend import check_engine_layout, open_backend
from doge_deploy.runtime.base import IntArray
from doge_deploy.runtime.ort import OrtRunner, graph_file, open_runner
from doge_deploy.runtime.tokenizer import TOKENIZER_FILE, Tokenizer
from doge_deploy.verify.cases import Call, Case, Limits, chunk, distinct_ids, repeating_ids
from doge_deploy.verify.held_out import HELD_OUT
from doge_deploy.verify.parity import CaseResult, References, Runners, make_replay, verify_layouts
from doge_deploy.verify.quality import QualityResult, judge_quality, stored_weights
from doge_deploy.verify.reference import Reference, few_threads
from doge_deploy.verify.replay import Replay
from doge_deploy.verify.source import open_reference
from doge_deploy.verify.tolerance import WIDER
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
    layouts: tuple[str, ...] = (),
    greedy_steps: int = 128,
    portable: bool = False,
    lowering: bool = False,
    backend: Backend | Literal["torch-kernels"] = "ort",
    engine: str | None = None,
    started: Callable[[str], None] = lambda what: None,
    finished: Callable[[CaseResult], None] = lambda result: None,
) -> Report:
    """Compare a bundle with transformers, or a legacy Doge with the reference of its revision.

    Args:
        path: the bundle.
        reference: the checkpoint it came from; where None, what the bundle itself names (a bundled name or a Hub id).
        layouts: which of its layouts; all where empty.
        greedy_steps: tokens of the greedy case, fewer where the bundle holds fewer.
        portable: judge the standard graphs, not those lowered for ONNX Runtime that `generate` runs.
        lowering: judge the static graph as both TensorRT products get it (one lowering serves both), in ONNX Runtime.
        backend: what runs the bundle. An engine shows no selections: what is judged by them is then left out, and said.
            With `torch-kernels` the model that was traced runs in PyTorch, its two operators as kernels.
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
    checkpoint = open_reference(bundle, reference)
    if lowering and backend != "ort":
        raise UsageError(f"--lowering is run in ONNX Runtime, not by --backend {backend}")
    one = _open_one(bundle, checkpoint, backend, layouts=layouts, engine=engine, portable=portable)
    started("compare weights")
    report = Report(
        bundle.path,
        manifest.dtype,
        manifest.options["routing"] if manifest.facts.is_moe else None,
        _reference_name(manifest.facts),
        compare_weights(bundle, checkpoint),
        skipped=_unreachable(bundle),
    )
    stored = stored_weights(bundle, checkpoint)
    with few_threads(checkpoint):
        if one is None:
            chosen = _layouts(bundle, layouts, lowering)
            report.graphs = {name: graph_file(bundle.layout(name), portable=portable) for name in chosen}
            if lowering:
                report.graphs = {name: describe_lowered(bundle, name) for name in chosen}
            elif stored:
                started("load the reference")
                exact = Reference(checkpoint, manifest.dtype, manifest.task)
                report.quality = _judge_quality(bundle, report.graphs, exact, started)
            # what the rounding of blocks costs is judged on the graph that is served, the cases on the standard one
            standard = portable or scheme_of(manifest.options) is not None
            runners = {layout: open_runners(bundle, layout, portable=standard, lowering=lowering) for layout in chosen}
        else:
            what, pair = one
            report.graphs = {pair.plain.signature.layout: f"{what}, --backend {backend}"}
            runners = {pair.plain.signature.layout: pair}
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


def _open_one(
    bundle: Bundle,
    checkpoint: Checkpoint,
    backend: Backend | Literal["torch-kernels"],
    *,
    layouts: tuple[str, ...],
    engine: str | None,
    portable: bool,
) -> tuple[str, Runners] | None:
    """What runs a bundle's static layout in place of ONNX Runtime, in words and as runners; None where that runs it."""
    if backend == "ort":
        return None
    if backend != TORCH_KERNELS:
        runner = open_backend(bundle, backend, engine=engine, portable=portable)
        check_engine_layout(layouts)
        return "an engine", Runners(runner, None, hides_selections=_selects(bundle))
    from doge_deploy.verify.torch_kernels import TorchKernelsRunner

    if engine is not None or portable or set(layouts) - {LOWERED_LAYOUT}:
        raise UsageError(
            f"--backend {backend} runs the {LOWERED_LAYOUT} layout in PyTorch: it takes no --engine, no --portable and "
            "no other --layout"
        )
    kernels = TorchKernelsRunner(bundle, checkpoint)
    return f"kernels on {kernels.device.type}", Runners(kernels, kernels if _selects(bundle) else None)


def _selects(bundle: Bundle) -> bool:
    """Whether the static graph chooses keys or experts."""
    return bundle.layout("static").keep_window or bundle.manifest.facts.is_moe


def _judge_quality(
    bundle: Bundle, graphs: Mapping[str, str], reference: Reference, started: Callable[[str], None]
) -> list[QualityResult]:
    """What quantization costs in each of these graphs, against a reference with the checkpoint's own weights."""
    results = []
    text_ids = _text_ids(bundle, HELD_OUT)
    for layout, file in graphs.items():
        started(f"quality of {file}")
        runner = open_runner(bundle, layout, spin=False, portable=file == bundle.layout(layout).file)
        replay = make_replay(bundle.manifest, layout, last_logits=runner.last_logits)
        results.append(judge_quality(layout, bundle.manifest.options["quantize"], runner, reference, replay, text_ids))
    return results


def _layouts(bundle: Bundle, asked: tuple[str, ...], lowering: bool) -> tuple[str, ...]:
    """The layouts to judge: those asked for or all; of a lowering the one that is lowered."""
    if not lowering:
        return asked or tuple(bundle.manifest.layouts)
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


def open_runners(bundle: Bundle, layout: str, *, portable: bool = False, lowering: bool = False) -> Runners:
    """The layout's graph as it is, and with its selections exposed where it has any; see `open_runner`.

    With `lowering` both are lowered for TensorRT (and run in ONNX Runtime).
    """
    chosen = bundle.layout(layout)
    source = bundle.path / graph_file(chosen, portable=portable or lowering)
    rewrite = _lowered if lowering else lambda model: ir.to_proto(model).SerializeToString()
    plain = open_runner(
        bundle, layout, spin=False, portable=portable, model=rewrite(ir.load(source)) if lowering else None
    )
    exposed: OrtRunner | None = None
    operators = [DYNAMIC_MASK_ATTENTION, WINDOW_BIAS] if chosen.keep_window else []
    operators += [CDMOE, ROUTED_EXPERTS] if bundle.manifest.facts.is_moe else []
    if operators:
        model = ExposeSelectionsPass(operators)(ir.load(source)).model
        exposed = open_runner(bundle, layout, spin=False, model=rewrite(model))
    return Runners(plain, exposed)


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
