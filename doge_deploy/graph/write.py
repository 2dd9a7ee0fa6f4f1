"""The files of a bundle that come from tracing: a graph for each layout, and the weights that they share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from doge_deploy import __version__
from doge_deploy.bundle.files import CALIBRATION_TOKENS, WEIGHTS_FILE, FileEntry
from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.signature import LAYOUTS, UNCACHED, make_signature, uncached_signature
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.config.model import DogeFacts
from doge_deploy.config.revisions import REVISIONS
from doge_deploy.graph.check import check_model
from doge_deploy.graph.feedback import MOST_TOKENS, choose_numbers, write_tokens
from doge_deploy.graph.passes.inline_functions import InlineFunctionsPass
from doge_deploy.graph.ranges import input_ranges
from doge_deploy.graph.trace import trace
from doge_deploy.graph.weight_formats import WeightFormat, format_of
from doge_deploy.graph.weights import TensorSources, write_weights
from doge_deploy.model.rope import rope_tensors
from doge_deploy.options.export import ExportOptions
from doge_deploy.process.progress import Progress


def write_graphs(
    directory: Path,
    checkpoint: Checkpoint,
    options: ExportOptions,
    *,
    dtype: str,
    max_length: int,
    progress: Progress,
    calibration: Sequence[int] = (),
) -> tuple[dict[str, Layout], dict[str, FileEntry]]:
    """Trace the layouts asked for and write their graphs and the weight file they share.

    Args:
        directory: of the new bundle.
        checkpoint: what is traced.
        options: what the user chose.
        dtype: NumPy's name of the graph's dtype.
        max_length: slots of a row.
        progress: told what is being done.
        calibration: ids of the text that scales of rounded inputs are made of, where the weight format rounds them, or
            that numbers are chosen on; empty where they are chosen without a text.

    Returns:
        The layouts by name, none of them lowered for a backend yet, and entries of the files that were hashed already.
    """
    facts = checkpoint.facts
    layouts: dict[str, Layout] = {}
    models: list[ir.Model] = []
    for name in _layouts(options):
        advance = progress.stage(f"trace {options.task if name == UNCACHED else name}")
        if name == UNCACHED:
            signature = uncached_signature(facts, options.task, dtype=dtype, max_length=max_length)
        else:
            last_logits = options.logits == "last"
            signature = make_signature(facts, name, dtype=dtype, max_length=max_length, last_logits=last_logits)
        models.append(
            trace(
                facts,
                signature,
                dtype=dtype,
                max_length=max_length,
                routing=options.routing,
                last_logits=options.logits == "last",
                task=options.task,
            )
        )
        file = "model.onnx" if not layouts else f"model.{name}.onnx"
        layouts[name] = Layout(file, signature, facts.keep_window(max_length), _selection_notes(facts, max_length))
        advance(1)
    weight_format = format_of(options)
    notes: tuple[str, ...] = ()
    if weight_format is not None:
        routing = options.routing
        notes += _calibrate(
            directory, checkpoint, weight_format, calibration, routing=routing, max_length=max_length, progress=progress
        )
    advance = progress.stage("write weights", sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
    sources = TensorSources(checkpoint, rope_tensors(checkpoint.config, facts, max_length), weight_format)
    for model in models:
        sources.rewrite(model)
    weights = write_weights(directory / WEIGHTS_FILE, models, sources, advance=advance)
    notes += tuple(f"{name} is not quantized: {reason}" for name, reason in _by_kind(sources.left).items())
    for name, model in zip(list(layouts), models, strict=True):
        layouts[name] = replace(layouts[name], notes=layouts[name].notes + notes)
        model.producer_name, model.producer_version = "doge-deploy", __version__
        ir.save(model, directory / layouts[name].file)
        check_model(directory / layouts[name].file, layouts[name].signature)
    return layouts, {WEIGHTS_FILE: weights}


def _calibrate(
    directory: Path,
    checkpoint: Checkpoint,
    weight_format: WeightFormat,
    ids: Sequence[int],
    *,
    routing: str,
    max_length: int,
    progress: Progress,
) -> tuple[str, ...]:
    """Give the format what it makes of a text; returns notes on that."""
    if weight_format.rounds_inputs_to:
        advance = progress.stage("calibrate")
        weight_format.ranges = input_ranges(checkpoint, ids, routing=routing, max_length=max_length)
        advance(1)
    if not weight_format.uses_covariances:
        return ()
    ids = ids[:MOST_TOKENS]
    if not ids:
        return ("numbers of 4 bits are chosen without a text",)
    advance = progress.stage("calibrate", checkpoint.facts.num_hidden_layers + 1)
    weight_format.chosen = choose_numbers(
        checkpoint, ids, weight_format, routing=routing, max_length=max_length, advance=advance
    )
    write_tokens(directory, ids)
    return (f"numbers of 4 bits are chosen on {len(ids):,} tokens, {CALIBRATION_TOKENS}",)


def inline_functions(directory: Path, layout: Layout) -> None:
    """Write the layout's standard graph anew, without local functions; it computes the same, in the same order.

    Raises:
        BrokenBundleError: the graph that came out is wrong.
    """
    model = InlineFunctionsPass()(ir.load(directory / layout.file)).model
    ir.save(model, directory / layout.file)
    check_model(directory / layout.file, layout.signature)


def _layouts(options: ExportOptions) -> tuple[str, ...]:
    if options.task != "causal-lm":
        return (UNCACHED,)
    return tuple(layout for layout in LAYOUTS if layout in options.kv_cache)


def _selection_notes(facts: DogeFacts, max_length: int) -> tuple[str, ...]:
    """Why a graph has no selection of keys, where it has none."""
    if not REVISIONS[facts.revision].drops_keys:
        return (f"no top-k of the dynamic mask: a Doge of {facts.revision} keeps every key",)
    if not facts.keep_window(max_length):
        return (
            f"top-k of the dynamic mask left out: a row holds at most max_length={max_length} keys, "
            f"keep_window_size={facts.keep_window_size} of which are kept",
        )
    return ()


def _by_kind(left: Mapping[str, str]) -> dict[str, str]:
    """Reasons per kind of tensor: `model.layers.*.self_attn.dt_proj.weight` stands for that of every layer."""
    return {re.sub(r"\.\d+\.", ".*.", name): reason for name, reason in left.items()}
