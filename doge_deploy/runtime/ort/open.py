"""The runner that fits a layout of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from doge_deploy.bundle.opening import Bundle
from doge_deploy.bundle.signature import SHARES_BUFFERS, SLOT_INDICES, UNCACHED
from doge_deploy.devices.host import multiplies_bytes
from doge_deploy.devices.packages import require_graph_packages
from doge_deploy.runtime.memory import check_memory
from doge_deploy.runtime.ort.graph_cache import open_cached
from doge_deploy.runtime.ort.growing import InPlaceGrowingOrtRunner
from doge_deploy.runtime.ort.runners import GrowingOrtRunner, OrtRunner, StaticOrtRunner, UncachedOrtRunner
from doge_deploy.runtime.ort.session import graph_file, load_library, open_session
from doge_deploy.runtime.ort.window import WindowOrtRunner
from doge_deploy.runtime.rows import ChangingAngles


def open_runner(
    bundle: Bundle,
    layout: str | None = None,
    *,
    threads: int | None = None,
    spin: int | None = None,
    flush_denormals: bool = False,
    model: bytes | None = None,
    portable: bool = False,
    profile: Path | None = None,
    cache: bool = True,
    leaves_interpreter: Callable[[], None] | None = None,
) -> OrtRunner:
    """A runner of one layout of a bundle.

    Args:
        bundle: an opened bundle. Where its files are still being checked, none of them is read before that has ended;
            an entry of `graph_cache` may be opened meanwhile, so that whoever gets the runner calls `Bundle.prove`.
        layout: "static" or "growing"; the bundle's first where None.
        threads, spin, profile: see `open_session`.
        flush_denormals: see `open_session`; without effect where keys are left out, which scores of any size decide.
        model: a changed graph of that layout to run instead of the bundle's file; extra outputs are allowed.
        portable: run the standard graph where the bundle also holds one lowered for ONNX Runtime.
        cache: take the optimised graph from `graph_cache`, or put it there.
        leaves_interpreter: see `open_session`.

    Raises:
        UsageError: the bundle has no such layout.
        MissingDependencyError: ONNX Runtime is missing, or the memory that the bundle takes at least.
        UnsupportedModelError: ONNX Runtime refuses the graph.
    """
    chosen = bundle.layout(layout)
    check_memory(bundle, chosen)
    load_library()
    file = graph_file(chosen, portable=portable)
    source: Path | bytes = bundle.path / file if model is None else model
    if _has_float4(bundle):
        require_graph_packages("a bundle with weights of float4 on the CPU")
        from doge_deploy.targets.ort import widen_float4

        bundle.prove()
        source = widen_float4(source)
    if bundle.manifest.dtype == "bfloat16":
        require_graph_packages("a bfloat16 bundle on the CPU")
        from doge_deploy.targets.ort import widen_bfloat16

        bundle.prove()
        source = widen_bfloat16(source)
    manifest = bundle.manifest
    facts = manifest.facts
    flush = flush_denormals and not facts.keep_window(manifest.max_length)
    opened = partial(
        open_session, folder=bundle.path, threads=threads, spin=spin, flush_denormals=flush, profile=profile
    )
    first = partial(opened, leaves_interpreter=leaves_interpreter)
    if cache and profile is None and source == bundle.path / file:
        session = open_cached(bundle, file, {"flush_denormals": str(flush)}, first)
    else:
        bundle.prove()
        session = first(source)
    if chosen.signature.layout == UNCACHED:
        return UncachedOrtRunner(session, chosen, manifest.max_length, facts.pad_token_id)
    last = manifest.last_logits
    if chosen.signature.layout == "growing":
        in_place = SHARES_BUFFERS in session.get_modelmeta().custom_metadata_map
        growing = InPlaceGrowingOrtRunner if in_place else GrowingOrtRunner
        return growing(session, chosen, max_length=manifest.max_length, last=last)
    whole, angles = bool(manifest.whole_calls), ChangingAngles.in_bundle(manifest)
    lowered = chosen.lowered.get("ort")
    long_calls = lowered.long_calls if lowered is not None and model is None and file == lowered.file else None
    long_session = None
    if long_calls is not None and not multiplies_bytes():
        long_session = partial(opened, bundle.path / long_calls, fold=False)
    options: dict[str, Any] = {"max_length": manifest.max_length, "last": last, "whole_calls": whole, "angles": angles}
    options["long_session"] = long_session
    if any(value.name == SLOT_INDICES for value in session.get_inputs()):
        return WindowOrtRunner(session, chosen, window=facts.keep_window_size, **options)
    return StaticOrtRunner(session, chosen, **options)


def _has_float4(bundle: Bundle) -> bool:
    """Whether weights are stored in numbers that ONNX Runtime does not have."""
    options = bundle.manifest.options
    if options.quantize is None or options.dtype == "fp32":
        return False
    from doge_deploy.graph.weight_formats import format_of  # only such bundles wait for it

    weights = format_of(options)
    return weights is not None and weights.rounds_inputs_to == "float4_e2m1fn"
