"""A checkpoint in, a bundle out."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from doge_deploy import __version__
from doge_deploy.bundle.genai_config import GENAI_CONFIG, follows_convention, genai_config, write_genai_config
from doge_deploy.bundle.manifest import Layout, Lowered, Manifest, file_entries, write_manifest
from doge_deploy.bundle.signature import LAYOUTS, UNCACHED, make_signature, uncached_signature, windowed
from doge_deploy.bundle.writing import writing_bundle
from doge_deploy.checkpoint import Checkpoint, check_finite, check_score_range, open_checkpoint
from doge_deploy.config.model import TASKS, DogeFacts
from doge_deploy.config.revisions import REVISIONS
from doge_deploy.errors import MissingDependencyError, UnsupportedModelError, UsageError
from doge_deploy.options.export import BLOCK_SIZES, ExportOptions

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Progress(Protocol):
    """What `export` tells about itself: stages in order, each with an amount of work."""

    def stage(self, name: str, total: int = 1) -> Callable[[int], None]:
        """Start a stage of `total` units; returns what is to be called with units done."""


def export(model: str, output: Path, options: ExportOptions, *, force: bool, progress: Progress) -> Manifest:
    """Export `model` to the bundle `output`.

    Args:
        model: a directory, a bundled name or a Hub id.
        output: the bundle's directory; it must not exist unless `force` is true.
        options: what the user chose.
        force: replace an existing bundle.
        progress: told what is being done.

    Raises:
        UsageError: `output` cannot be written, or the checkpoint has no weights for the task.
        UnsupportedModelError: the checkpoint is broken, or cannot be exported exactly with these options.
        MissingDependencyError: torch, transformers or onnxscript is not installed.
    """
    require_export_dependencies()
    if options.quantize is not None and options.dtype != "fp32":
        raise UsageError(
            f"quantize={options.quantize} with dtype={options.dtype}: quantized weights are computed with in fp32; "
            "leave dtype at fp32"
        )
    if options.quantize is not None and options.task != "causal-lm":
        raise UsageError(
            f"quantize={options.quantize} with task={options.task}: what rounding costs is judged by the "
            "predictions of a language model; quantize with task=causal-lm only"
        )
    check_blocks(options)
    if options.block_size is None:
        options = options.model_copy(update={"block_size": BLOCK_SIZES.get(options.quantize or "")})
    with writing_bundle(output, force=force) as directory:
        advance = progress.stage("check checkpoint")
        checkpoint = open_checkpoint(model, num_layers=options.num_layers)
        facts = checkpoint.facts
        check_task(facts, options, model)
        check_activation(facts, options.dtype)
        max_length = resolve_max_length(facts, options.max_length)
        check_positions(max_length)
        warnings = tuple(check_score_range(checkpoint, DTYPES[options.dtype]))
        check_finite(checkpoint, dtype=DTYPES[options.dtype], others=_in_half(checkpoint, options))
        advance(1)
        layouts = _write_graphs(directory, checkpoint, options, max_length, progress)
        for file in checkpoint.companion_files:
            shutil.copyfile(file, directory / file.name)
        # onnxruntime-genai knows neither a cache that slides nor an input for what RoPE remembers
        if "growing" in layouts and follows_convention(layouts["growing"].signature):
            document = genai_config(
                facts, layouts["growing"], max_length=max_length, generation_config=checkpoint.generation_config
            )
            write_genai_config(directory / GENAI_CONFIG, document)
        advance = progress.stage("hash files")
        manifest = Manifest(
            tool={"name": "doge-deploy", "version": __version__},
            libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
            checkpoint={"sha256": checkpoint.sha256, "source": checkpoint.source},
            facts=facts,
            options={**options.model_dump(mode="json"), "max_length": max_length, **_cache_options(options)},
            layouts=layouts,
            warnings=warnings,
            files=file_entries(directory),
        )
        write_manifest(directory, manifest)
        advance(1)
    return manifest


_LIBRARIES = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers")


def _in_half(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, str]:
    """Tensors that are stored as float16 in a graph of another dtype."""
    from doge_deploy.graph.passes.half_weights import kept_whole

    if options.quantize != "fp16":
        return {}
    return {name: "float16" for name, info in checkpoint.tensors.items() if not kept_whole(name, info.shape)}


def require_export_dependencies() -> None:
    """Raises MissingDependencyError where a package that tracing needs is absent."""
    for name in ("torch", "transformers", "onnxscript"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise MissingDependencyError(
                f"export needs {name}, which is not installed: pip install 'doge-deploy[export]'"
            ) from None


def check_blocks(options: ExportOptions) -> None:
    """Raises UsageError where an option of blocks is given and weights are not stored in blocks."""
    fields = sorted({"block_size", "symmetric"} & options.model_fields_set)
    given = [name for name in fields if getattr(options, name) is not None]
    if given and options.quantize not in ("int8", "int4"):
        stored = "no quantize" if options.quantize is None else f"quantize={options.quantize}"
        raise UsageError(
            f"{given[0]}={getattr(options, given[0])!r} with {stored}: only weights of 8 or 4 bits have blocks; leave "
            "it out or give quantize=int8 or int4"
        )


def check_task(facts: DogeFacts, options: ExportOptions, source: str) -> None:
    """Raises UsageError where the checkpoint has no weights for the task, or an option has no meaning in it."""
    possible = TASKS[facts.architecture]
    if options.task not in possible:
        raise UsageError(
            f"task={options.task}: {source} is a {facts.architecture}; give --task {' or --task '.join(possible)}"
        )
    for name in ("kv_cache", "logits"):
        if options.task != "causal-lm" and name in options.model_fields_set:
            raise UsageError(f"{name}={getattr(options, name)!r}: has no meaning for task={options.task}; leave it out")


def check_activation(facts: DogeFacts, dtype: str) -> None:
    """Raises UnsupportedModelError where transformers itself cannot compute the activation in this dtype.

    Reference: `XIELUActivation` in transformers' activations.py, whose parameters are bfloat16 in a model of any dtype.
    """
    if facts.hidden_act == "xielu" and dtype == "fp16":
        raise UnsupportedModelError(
            "hidden_act='xielu' with dtype=fp16: transformers keeps its weights in bfloat16, so that float16 becomes "
            "float32 there, and fails in the product that follows; dtype must be one of fp32, bf16"
        )


def _cache_options(options: ExportOptions) -> dict[str, object]:
    return {} if options.task == "causal-lm" else {"kv_cache": [], "logits": None}


def resolve_max_length(facts: DogeFacts, asked: int | None) -> int:
    """The number of positions of a bundle: what was asked for, or all that the checkpoint has and whose angles do not
    depend on how a text is cut into calls.
    """
    if asked is not None:
        return asked
    limit = facts.stateless_length
    return facts.max_position_embeddings if limit is None else min(limit, facts.max_position_embeddings)


MAX_POSITIONS = 2**24
"""float32 holds every whole number up to here; angles are computed from positions in float32."""


def check_positions(max_length: int) -> None:
    """Raises UnsupportedModelError where a bundle of so many positions would have wrong angles."""
    if max_length > MAX_POSITIONS:
        raise UnsupportedModelError(
            f"max_length={max_length}: positions beyond {MAX_POSITIONS} are no float32 numbers; give --max-length "
            f"{MAX_POSITIONS} or less"
        )


def _write_graphs(
    directory: Path, checkpoint: Checkpoint, options: ExportOptions, max_length: int, progress: Progress
) -> dict[str, Layout]:
    """Trace the layouts asked for and write their graphs and the weight file they share."""
    import onnx_ir as ir

    from doge_deploy.graph.check import check_model
    from doge_deploy.graph.trace import trace
    from doge_deploy.graph.weights import WEIGHTS_FILE, TensorSources, write_weights
    from doge_deploy.model.rope import rope_tensors

    facts, dtype = checkpoint.facts, DTYPES[options.dtype]
    last_logits = options.logits == "last"
    keep_window = facts.keep_window(max_length)
    notes: tuple[str, ...] = ()
    if not REVISIONS[facts.revision].drops_keys:
        notes = (f"no top-k of the dynamic mask: a Doge of {facts.revision} keeps every key",)
    elif not keep_window:
        notes = (
            f"top-k of the dynamic mask left out: a row holds at most max_length={max_length} keys, "
            f"keep_window_size={facts.keep_window_size} of which are kept",
        )
    layouts: dict[str, Layout] = {}
    models = []
    cached = options.task == "causal-lm"
    for name in (layout for layout in LAYOUTS if layout in options.kv_cache) if cached else (UNCACHED,):
        advance = progress.stage(f"trace {name if cached else options.task}")
        if cached:
            signature = make_signature(facts, name, dtype=dtype, max_length=max_length, last_logits=last_logits)
        else:
            signature = uncached_signature(facts, options.task, dtype=dtype, max_length=max_length)
        models.append(
            trace(
                facts,
                signature,
                dtype=dtype,
                max_length=max_length,
                routing=options.routing,
                last_logits=last_logits,
                task=options.task,
            )
        )
        file = "model.onnx" if not layouts else f"model.{name}.onnx"
        layouts[name] = Layout(file, signature, keep_window, notes)
        advance(1)
    advance = progress.stage("write weights", sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
    rope = rope_tensors(checkpoint.config, facts, max_length)
    sources = TensorSources(checkpoint, rope, options.model_dump())
    for model in models:
        sources.quantize(model)
    write_weights(directory / WEIGHTS_FILE, models, sources, advance=advance)
    if sources.left:
        notes = tuple(f"{name} is not quantized: {reason}" for name, reason in _by_kind(sources.left).items())
        layouts = {name: replace(layout, notes=layout.notes + notes) for name, layout in layouts.items()}
    for layout, model in zip(layouts.values(), models, strict=True):
        model.producer_name, model.producer_version = "doge-deploy", __version__
        ir.save(model, directory / layout.file)
        check_model(directory / layout.file, layout.signature)
    if "static" in layouts:
        advance = progress.stage("lower for ONNX Runtime")
        layouts["static"] = _lower(directory, layouts["static"])
        advance(1)
    return layouts


def _by_kind(left: Mapping[str, str]) -> dict[str, str]:
    """Reasons per kind of tensor: `model.layers.*.self_attn.dt_proj.weight` stands for that of every layer."""
    return {re.sub(r"\.\d+\.", ".*.", name): reason for name, reason in left.items()}


def _lower(directory: Path, layout: Layout) -> Layout:
    """Write the layout's graph in the form that ONNX Runtime's CPU provider runs fastest, beside the standard one."""
    import onnx_ir as ir

    from doge_deploy.graph.check import check_model
    from doge_deploy.targets.ort import lower

    lowering = lower(ir.load(directory / layout.file))
    if not lowering.applied:
        return replace(layout, ort=Lowered(None, (), lowering.declined))
    file = layout.file.replace(".onnx", ".ort.onnx")
    ir.save(lowering.model, directory / file)
    drops = lowering.drops_keys
    check_model(directory / file, windowed(layout.signature) if drops else layout.signature)
    record = Lowered(file, lowering.applied, lowering.declined, lowering.requires, drops)
    return replace(layout, ort=record)
