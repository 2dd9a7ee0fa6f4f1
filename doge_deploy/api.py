"""The functions that a program calls; the command line calls them too.

Everything that goes wrong on purpose is raised as a `DogeDeployError` with one line of text (see `errors.py`). No
function prints or exits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from doge_deploy.bundle.archive import Packed, pack, unpack
from doge_deploy.errors import (
    BrokenBundleError,
    DogeDeployError,
    MismatchError,
    MissingDependencyError,
    UnsupportedModelError,
    UsageError,
)
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.options.build import BuildOptions
from doge_deploy.options.export import ExportOptions
from doge_deploy.options.generation import GenerationOptions
from doge_deploy.options.keywords import BuildKeywords, ExportKeywords
from doge_deploy.options.load import combine_options
from doge_deploy.process.progress import NO_PROGRESS
from doge_deploy.runtime.choices import TextChoices
from doge_deploy.runtime.text_model import Generation, TextModel

if TYPE_CHECKING:  # what takes long to import is imported by the function that needs it
    from doge_deploy.bundle.engine_record import EngineRecord
    from doge_deploy.bundle.opening import Bundle
    from doge_deploy.process.progress import Progress
    from doge_deploy.verify.bisect.finding import Culprit
    from doge_deploy.verify.localize.finding import Localization
    from doge_deploy.verify.parity import CaseResult
    from doge_deploy.verify.report import Report

__all__ = [
    "export",
    "build",
    "pack",
    "unpack",
    "verify",
    "record",
    "localize",
    "bisect",
    "load",
    "ExportOptions",
    "BuildOptions",
    "GenerationOptions",
    "TextChoices",
    "TextModel",
    "Generation",
    "Packed",
    "DogeDeployError",
    "MismatchError",
    "UsageError",
    "UnsupportedModelError",
    "BrokenBundleError",
    "MissingDependencyError",
]


def export(
    model: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    adapter: str | Path | None = None,
    calibration_text: str | Path | None = None,
    strict: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **choices: Unpack[ExportKeywords],
) -> Bundle:
    """Trace a checkpoint to an ONNX bundle.

    Args:
        model: a directory, a Hub id (owner/name), or one of the bundled doge-tiny and doge-tiny-moe.
        output: the bundle's directory; it is there whole or not at all.
        options: what to export; defaults where None.
        adapter: a directory or Hub id of a PEFT LoRA adapter to merge.
        calibration_text: a file of text for weight formats that are calibrated (fp8, nvfp4, int4 in half precision or
            with `calibrate`); the checkpoint's own `calibration.txt`, or that of this package, where None.
        strict: refuse keys of config.json that transformers ignores.
        force: replace an existing bundle.
        progress: told what is being done.
        choices: fields of `ExportOptions`, which replace those of `options`.

    Returns:
        The bundle: `path` and `manifest`, whose `warnings` a user should see.

    Raises:
        UsageError: an option is not legal, or `output` cannot be written.
        UnsupportedModelError: the checkpoint is broken, or cannot be exported exactly with these options.
        MissingDependencyError: torch, transformers or onnxscript is not installed (the extra `export`).
    """
    from doge_deploy.bundle.opening import Bundle
    from doge_deploy.pipelines.export import export as run

    chosen = combine_options(ExportOptions, options, choices)
    output = Path(output)
    merged = None if adapter is None else str(adapter)
    told = progress or NO_PROGRESS
    manifest = run(
        str(model),
        output,
        chosen,
        force=force,
        progress=told,
        adapter=merged,
        strict=strict,
        calibration_text=None if calibration_text is None else Path(calibration_text),
    )
    return Bundle(output, manifest)


def build(
    bundle: str | Path,
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    **choices: Unpack[BuildKeywords],
) -> EngineRecord:
    """Build a TensorRT engine of a bundle's static graph into the bundle.

    Args:
        bundle: the bundle's directory.
        options: what to build; defaults where None.
        force: replace an engine of the same name.
        progress: told what is being done.
        choices: fields of `BuildOptions`, which replace those of `options`.

    Returns:
        What the bundle's manifest now says about the engine; it lies in `directory`, relative to the bundle.

    Raises:
        UsageError: an option is not legal or does not fit the bundle or the target, or the engine exists.
        UnsupportedModelError: the target cannot do what the graph needs.
        BrokenBundleError: a file of the bundle is missing or was altered.
        MissingDependencyError: the target's library, a device or a plugin is missing, or the library broke down.
    """
    from doge_deploy.pipelines.build import build as run

    chosen = combine_options(BuildOptions, options, choices)
    return run(bundle, chosen, force=force, progress=progress or NO_PROGRESS)


def verify(
    bundle: str | Path,
    *,
    recording: str | Path | None = None,
    reference: str | None = None,
    adapter: str | None = None,
    layouts: Sequence[str] = (),
    greedy_steps: int | None = None,
    portable: bool = False,
    lowering: bool = False,
    lowering_for: str | None = None,
    backend: str = DEFAULT_BACKEND,
    engine: str | None = None,
    baseline: str | Path | None = None,
    started: Callable[[str], None] = lambda what: None,
    finished: Callable[[CaseResult], None] = lambda result: None,
) -> Report:
    """Compare a bundle with transformers in eager mode, call by call; a legacy Doge with the reference of its revision.

    Args:
        bundle: the bundle's directory.
        recording: a file of `record`, which takes the place of the reference: neither torch nor transformers nor the
            checkpoint is needed.
        reference: the checkpoint it came from; where None, what the bundle itself names.
        adapter: the PEFT adapter that was merged into it; where None, what the bundle itself names.
        layouts: which of its layouts; all where empty.
        greedy_steps: tokens of the greedy case, 128 where None, fewer where the bundle holds fewer; a recording has its
            own.
        portable: judge the standard graphs, not those lowered for ONNX Runtime.
        lowering: judge the static graph as it is lowered for TensorRT, in ONNX Runtime.
        lowering_for: judge it as it is lowered for this backend, in ONNX Runtime's CPU provider: `cuda`.
        backend: what runs the bundle; `torch-kernels` is PyTorch with the plugins' kernels.
        engine: which engine, where the backend has several.
        baseline: an earlier report as a file of `verify --json`: a case that uses more than twice the share of its
            tolerance that it used then makes `passed` false too.
        started: told what is about to be done.
        finished: told each case when it is judged.

    Returns:
        Everything that was found. A difference beyond its tolerance is no error here: see `passed` and `failed_cases`,
        or call `require_passed`.

    Raises:
        UsageError: options contradict each other or the bundle, or the bundle does not say where it came from and
            `reference` is None; or `baseline` is no such file, or of another dtype or other cases.
        BrokenBundleError, UnsupportedModelError: bundle, checkpoint or recording is broken, or they do not belong
            together.
        MissingDependencyError: torch, transformers or the backend is missing (the extras `export` and `cpu`); with a
            recording only the backend is needed.
    """
    from doge_deploy.verify.needs import require_reference

    require_reference(recording, backend)
    from doge_deploy.bundle.opening import open_bundle
    from doge_deploy.verify.baseline import compare, read_baseline
    from doge_deploy.verify.run import verify as run

    before = None if baseline is None else read_baseline(baseline)
    if before is not None:  # told before the work
        before.check_dtype(open_bundle(bundle).manifest.dtype)
    report = run(
        bundle,
        recording=recording,
        reference=reference,
        adapter=adapter,
        layouts=tuple(layouts),
        greedy_steps=greedy_steps,
        portable=portable,
        lowering=lowering,
        lowering_for=lowering_for,
        backend=backend,
        engine=engine,
        started=started,
        finished=finished,
    )
    if before is not None:
        report.baseline = compare(before, report.dtype, report.results)
    return report


def record(
    bundle: str | Path,
    output: str | Path,
    *,
    reference: str | None = None,
    adapter: str | None = None,
    layouts: Sequence[str] = (),
    greedy_steps: int = 128,
    started: Callable[[str], None] = lambda what: None,
) -> str:
    """Write what `verify` asks of a bundle's reference into a file, for machines that have no reference.

    Args:
        bundle: the bundle's directory; its graphs are not run.
        output: the file.
        reference, adapter, layouts: as of `verify`.
        greedy_steps: tokens of the greedy case, fewer where the bundle holds fewer.
        started: told what is about to be done.

    Returns:
        The sha256 of everything in the file; the same input gives the same file.

    Raises:
        UsageError: the bundle does not say where it came from and `reference` is None, or the file cannot be written.
        BrokenBundleError, UnsupportedModelError: bundle or checkpoint is broken, they do not belong together, or
            nothing can be recorded.
        MismatchError: the bundle's weights are not the checkpoint's.
        MissingDependencyError: torch or transformers is missing (the extra `export`).
    """
    from doge_deploy.devices.packages import require_export_packages

    require_export_packages("record")
    from doge_deploy.verify.recording.record import record as run

    chosen = tuple(layouts)
    _, digest = run(
        bundle,
        Path(output),
        reference=reference,
        adapter=adapter,
        layouts=chosen,
        greedy_steps=greedy_steps,
        started=started,
    )
    return digest


def localize(
    bundle: str | Path,
    case: str | None = None,
    *,
    report: Report | None = None,
    reference: str | None = None,
    adapter: str | None = None,
    portable: bool = False,
    lowering: bool = False,
    greedy_steps: int = 128,
    started: Callable[[str], None] = lambda what: None,
) -> Localization:
    """Name the call, the layer and the stage in which a bundle differs from its reference, and why.

    Every stage is run alone on the reference's own input, in the standard graph and in the lowered one, so that an
    error is charged to the stage that makes it.

    Args:
        bundle: the bundle's directory.
        case: `<layout>/<case>`, or a case's name in the bundle's first layout; where None, the first that failed in
            `report`.
        report: what `verify` returned; needed where no case is named.
        reference: the checkpoint, as for `verify`.
        adapter: the merged adapter, as for `verify`.
        portable: judge the standard graph first, not the one lowered for ONNX Runtime.
        lowering: hold the static graph as it is lowered for TensorRT against the standard one.
        greedy_steps: tokens of the greedy case.
        started: told what is about to be done.

    Returns:
        The finding, None where there is nothing to find, and every reading that it was made of; `lines()` says it in
        words.

    Raises:
        UsageError: there is no such case, or neither a case nor a report was given.
        BrokenBundleError, UnsupportedModelError: as for `verify`; also where a bundle was exported by a version that
            marked no stages in its graphs.
        MissingDependencyError: as for `verify`.
    """
    from doge_deploy.devices.packages import require_export_packages

    require_export_packages("verify")
    from doge_deploy.verify.localize.run import localize as run

    return run(
        bundle,
        case,
        report=report,
        reference=reference,
        adapter=adapter,
        portable=portable,
        lowering=lowering,
        greedy_steps=greedy_steps,
        started=started,
    )


def bisect(
    good: str | Path,
    bad: str | Path,
    *,
    good_python: str | None = None,
    bad_python: str | None = None,
    started: Callable[[str], None] = lambda what: None,
) -> Culprit | None:
    """Name the first weight, pass or package that makes two bundles of one checkpoint compute different things.

    The checkpoint, torch and transformers are not needed.

    Args:
        good: a bundle that computes what it should.
        bad: a bundle that does not; or the same one, in another environment.
        good_python: the interpreter of an environment with doge-deploy in which GOOD is run; this one where None.
        bad_python: likewise for BAD.
        started: told what is about to be done.

    Returns:
        What makes the difference, `lines()` says it in words; None where both compute the same.

    Raises:
        UnsupportedModelError: the bundles are of different checkpoints, or of a version that marked no stages.
        BrokenBundleError: a bundle is broken.
        MissingDependencyError: a package or an interpreter is missing (the extras `graph` and `cpu`).
    """
    from doge_deploy.verify.bisect.run import bisect as run

    return run(good, bad, good_python=good_python, bad_python=bad_python, started=started)


def load(
    bundle: str | Path,
    backend: str = DEFAULT_BACKEND,
    *,
    layout: str | None = None,
    portable: bool = False,
    threads: int | None = None,
    spin: int | None = None,
    engine: str | None = None,
    flush_denormals: bool = False,
    speculate: bool = True,
    graph_cache: bool = True,
    defaults: TextChoices | None = None,
) -> TextModel:
    """Open a bundle to generate text.

    Args:
        bundle: the bundle's directory. Hashes of its small files are checked, of large ones the size.
        backend: `ort`, ONNX Runtime on the CPU; or `trt-rtx` or `trt`, an engine that `build` made.
        layout: of ONNX Runtime: "static" or "growing"; the bundle's first where None.
        portable: of ONNX Runtime: run the standard graph, not the one lowered for it.
        threads: of ONNX Runtime: CPU threads, at most one per CPU; one per core where None.
        spin: of ONNX Runtime: microseconds that an idle thread waits for work before it sleeps; 50 where None.
        engine: the name of an engine, where several fit.
        flush_denormals: of ONNX Runtime: take numbers below 1.2e-38 for zero, which is faster on processors of Intel.
            If this is the first session of the process, ONNX Runtime sets that mode for the calling thread too, for
            good; so a program has to ask for it.
        speculate: of ONNX Runtime: guess tokens from what the text holds already, and check several in one call. It
            changes the time that a text takes and not the text.
        graph_cache: of ONNX Runtime: keep the graph as it was optimised in a folder of the user, for the next time; see
            docs/generate.md.
        defaults: choices for every text that makes none of its own; they go before the bundle's generation_config.json.

    Returns:
        The model, to be used by one thread at a time. It is a context manager, which closes it.

    Raises:
        UsageError: there is no such bundle, layout or engine, its task is not causal-lm, or a default is not legal.
        BrokenBundleError: a file is missing or was altered, or the tokenizer cannot be read.
        UnsupportedModelError: the backend refuses the graph.
        MissingDependencyError: the backend's library or device is missing (ONNX Runtime: the extra `cpu`).
    """
    model = TextModel(
        bundle,
        backend=backend,
        layout=layout,
        portable=portable,
        threads=threads,
        spin=spin,
        engine=engine,
        flush_denormals=flush_denormals,
        speculate=speculate,
        graph_cache=graph_cache,
        defaults=defaults,
        at_once=True,
    )
    model.open()
    return model
