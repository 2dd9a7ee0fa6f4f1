"""A checkpoint in, a bundle out: the order of an export, and nothing else."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from doge_deploy import __version__
from doge_deploy.bundle.files import WEIGHTS_FILE, file_entries
from doge_deploy.bundle.genai_config import GENAI_CONFIG, follows_convention, genai_config, write_genai_config
from doge_deploy.bundle.manifest import Layout, Manifest, Source
from doge_deploy.bundle.writing import check_place, sync_path, write_manifest, writing_bundle
from doge_deploy.checkpoint import Checkpoint, check_finite, check_score_range, open_checkpoint
from doge_deploy.checkpoint.tokenizer import encode, write_tokenizer
from doge_deploy.devices.packages import require_export_packages
from doge_deploy.dtypes import NAMES
from doge_deploy.errors import UsageError
from doge_deploy.graph.weight_formats import WeightFormat, format_of, resolve_options, weight_formats
from doge_deploy.options.compatibility import check_facts, resolve_max_length
from doge_deploy.options.export import ExportOptions
from doge_deploy.options.generation import GENERATION_CONFIG, illegal_settings
from doge_deploy.options.resolved import ResolvedOptions
from doge_deploy.process.background import InBackground
from doge_deploy.process.progress import Progress
from doge_deploy.targets.backend import backends
from doge_deploy.text.calibration import CALIBRATION, CALIBRATION_FILE

_LIBRARIES = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers")


def export(
    model: str,
    output: Path,
    options: ExportOptions,
    *,
    force: bool,
    progress: Progress,
    adapter: str | None = None,
    strict: bool = False,
    calibration_text: Path | None = None,
) -> Manifest:
    """Export `model` to the bundle `output`.

    Args:
        model: a directory, a bundled name or a Hub id.
        output: the bundle's directory; it must not exist unless `force` is true.
        options: what the user chose.
        force: replace an existing bundle.
        progress: told what is being done.
        adapter: a directory or Hub id of a PEFT LoRA adapter to merge.
        strict: refuse keys of config.json that transformers ignores.
        calibration_text: a file of text for formats that round activations or choose numbers by them; the
            checkpoint's own, or that of this package, where None.

    Raises:
        UsageError: `output` cannot be written, or the checkpoint has no weights for the task.
        UnsupportedModelError: the checkpoint is broken, or cannot be exported exactly with these options.
        MissingDependencyError: torch, transformers or onnxscript is not installed.
    """
    require_export_packages("export")
    options = resolve_options(options)
    _check_lower_for(options)
    if calibration_text is not None:
        _check_calibrated(options)
    dtype = NAMES[options.dtype]
    check_place(output, force=force)
    advance = progress.stage("check checkpoint")
    checkpoint = open_checkpoint(model, num_layers=options.num_layers, adapter=adapter, strict=strict)
    facts = checkpoint.facts
    check_facts(facts, options, model)
    # beside the imports, which wait for nothing; what ends this early does not wait for it
    identity = InBackground(lambda: checkpoint.sha256, "doge-checkpoint-hash", abandoned_at_exit=True)
    max_length = resolve_max_length(facts, options.max_length)
    # this takes seconds: most that is refused has been; and nothing is written yet that a signal meanwhile would leave
    from doge_deploy.graph.write import inline_functions, write_graphs

    with writing_bundle(output, force=force) as directory:
        warnings = (*checkpoint.warnings, *check_score_range(checkpoint, dtype))
        others = {}
        if (weight_format := format_of(options)) is not None:
            others = weight_format.range_dtypes({name: info.shape for name, info in checkpoint.tensors.items()})
        check_finite(checkpoint, dtype=dtype, others=others)
        advance(1)
        calibration: Sequence[int] = ()
        if weight_format is not None and weight_format.is_calibrated:
            calibration, source = _calibration(checkpoint, calibration_text, weight_format, options)
            warnings += source
        if weight_format is not None and weight_format.calibrated_dtypes is not None:
            options = options.model_copy(update={"calibrate": weight_format.uses_covariances and bool(calibration)})
        layouts, hashed = write_graphs(
            directory,
            checkpoint,
            options,
            dtype=dtype,
            max_length=max_length,
            progress=progress,
            calibration=calibration,
        )
        # on its way to the disk while the rest is made; an error is told once, so it is asked for below
        synced = InBackground(lambda: sync_path(directory / WEIGHTS_FILE), "doge-sync", abandoned_at_exit=True)
        layouts = _lowered(directory, layouts, options.lower_for, progress)
        if options.inline_functions:  # only now: a lowering looks for the operators that the functions stand for
            advance = progress.stage("inline functions")
            for layout in layouts.values():
                inline_functions(directory, layout)
            advance(1)
        advance = progress.stage("check tokenizer")
        warnings += write_tokenizer(checkpoint, directory)
        warnings += tuple(
            f"{GENERATION_CONFIG}: {text}" for text in illegal_settings(checkpoint.generation_config or {})
        )
        advance(1)
        # onnxruntime-genai knows neither a cache that slides nor an input for what RoPE remembers
        if "growing" in layouts and follows_convention(layouts["growing"].signature):
            document = genai_config(
                facts, layouts["growing"], max_length=max_length, generation_config=checkpoint.generation_config
            )
            write_genai_config(directory / GENAI_CONFIG, document)
        advance = progress.stage("hash files")
        identity.result()
        synced.result()
        manifest = Manifest(
            tool={"name": "doge-deploy", "version": __version__},
            libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
            checkpoint=_source(checkpoint),
            facts=facts,
            options=ResolvedOptions.of(options, max_length=max_length),
            layouts=layouts,
            warnings=warnings,
            files=file_entries(directory, hashed),
        )
        write_manifest(directory, manifest)
        advance(1)
    return manifest


_RANDOM_TOKENS = 1024


def _check_calibrated(options: ExportOptions) -> None:
    """Raises UsageError where a text for calibration has no meaning."""
    found = format_of(options)
    if found is not None and not found.is_calibrated and options.calibrate is False:
        raise UsageError("--calibration-text with calibrate=False, which takes no text: leave one of them out")
    if found is None or not found.is_calibrated:
        raise UsageError(f"--calibration-text: only some weight formats are calibrated; give {_calibrated_formats()}")


def _calibrated_formats() -> str:
    """What to give for a format that is calibrated: in every dtype that it is offered for, in some of them, or where
    that is asked for.
    """
    always, others = [], []
    for name, known in weight_formats().items():
        dtypes = [dtype for dtype in known.dtypes if known(dtype=dtype).is_calibrated]
        if len(dtypes) == len(known.dtypes):
            always.append(name)
        elif known.calibrated_dtypes is not None:
            others.append(f"--quantize {name} with --dtype {' or '.join(dtypes)}, or with --calibrate")
    return ", or ".join((f"--quantize {' or '.join(always)}", *others))


def _calibration(
    checkpoint: Checkpoint, given: Path | None, weight_format: WeightFormat, options: ExportOptions
) -> tuple[Sequence[int], tuple[str, ...]]:
    """Ids of the text that weights or activations are calibrated on, and a warning where there is no text.

    Raises:
        UsageError: the file that was given cannot be read, or says nothing; or a text was asked for that nothing can
            read.
    """
    file = checkpoint.path / CALIBRATION_FILE if given is None else given
    text, culprit = CALIBRATION, "text for calibration"
    if given is not None or file.is_file():
        culprit = str(file) if given is None else f"--calibration-text {file}"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{culprit}: cannot be read as text: {error}") from error
    ids = encode(checkpoint, text)
    if ids is None and (given is not None or options.calibrate):
        asked = f"--calibration-text {given}" if given is not None else "calibrate=True"
        raise UsageError(f"{asked}: the checkpoint has no tokenizer to read a text with; leave it out, or add one")
    if ids is None and weight_format.uses_covariances:
        return (), ("numbers of 4 bits are chosen without a text: the checkpoint has no tokenizer",)
    if ids is None:
        size = checkpoint.facts.vocab_size
        warning = f"activations are calibrated on {_RANDOM_TOKENS} random tokens: the checkpoint has no tokenizer"
        return [(7 * place * place + 3 * place) % size for place in range(_RANDOM_TOKENS)], (warning,)
    if not text.strip():
        raise UsageError(f"{culprit}: holds no text")
    if not ids or max(ids) >= checkpoint.facts.vocab_size:
        found = f"token {max(ids)}" if ids else "no token"
        raise UsageError(
            f"{culprit}: the tokenizer makes {found} of it; tokens of this model are 0 to "
            f"{checkpoint.facts.vocab_size - 1}"
        )
    return ids, ()


def _check_lower_for(options: ExportOptions) -> None:
    """Raises UsageError where a graph is to be lowered for what lowers none when asked, or not of this bundle."""
    for name in options.lower_for:
        known = [backend for backend in backends() if backend.lowers_when_asked]
        asked = next((backend for backend in known if backend.name == name), None)
        if asked is None:
            raise UsageError(f"--lower-for {name}: must be one of {', '.join(backend.name for backend in known)}")
        if options.task != "causal-lm" or not set(asked.lowers) & set(options.kv_cache):
            raise UsageError(f"--lower-for {name} needs a bundle with --kv-cache {' or '.join(asked.lowers)}")


def _lowered(
    directory: Path, layouts: Mapping[str, Layout], asked: tuple[str, ...], progress: Progress
) -> dict[str, Layout]:
    """The layouts with what every installed backend made of them, except those that were not asked to."""
    found = dict(layouts)
    for backend in backends():
        if backend.lowers_when_asked and backend.name not in asked:
            continue
        for name in (one for one in backend.lowers if one in layouts):
            advance = progress.stage(f"lower for {backend.title}")
            lowered = backend.lower(directory, layouts[name])
            if lowered is not None:
                found[name] = replace(found[name], lowered={**found[name].lowered, backend.name: lowered})
            advance(1)
    return found


def _source(checkpoint: Checkpoint) -> Source:
    """Where the weights came from."""
    source: Source = {"sha256": checkpoint.sha256, "source": checkpoint.source}
    if checkpoint.adapter is not None:
        source["adapter"] = {"sha256": checkpoint.adapter.sha256, "source": checkpoint.adapter.source}
    return source
