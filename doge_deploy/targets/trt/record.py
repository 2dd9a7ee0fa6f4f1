"""The record of a built engine, as the manifest holds it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from doge_deploy.bundle.engine_record import ENGINES, EngineRecord, LayerCounts, Network, SourceFile
from doge_deploy.bundle.opening import Bundle
from doge_deploy.devices.host import platform_name
from doge_deploy.options.build import BuildOptions
from doge_deploy.targets.trt.job import Finished
from doge_deploy.targets.trt.parts import Part
from doge_deploy.targets.trt.vendor import PRODUCTS

if TYPE_CHECKING:  # brings onnx_ir, whose absence `build` reports
    from doge_deploy.targets.trt.layout import LoweredLayout


@dataclass(frozen=True)
class Built:
    """A network, once it is built."""

    part: Part
    lowered: LoweredLayout
    """The graph that the parser got."""
    lowered_onnx: bytes
    """The same, serialized."""
    finished: Finished
    """What the process that built it found out."""
    engine_bytes: int
    """Size of its file."""
    seconds: float
    """Wall time of the build."""


def make_record(
    bundle: Bundle, *, name: str, layout: str, options: BuildOptions, built: Sequence[Built]
) -> EngineRecord:
    """What is known of an engine once it is built.

    Args:
        bundle: what it is built of, and into.
        name: of the engine.
        layout: name of the layout it was built of.
        options: what the user chose.
        built: its networks, the one that decodes first.
    """
    directory = f"{ENGINES}/{name}"
    first, *others = built
    lowered, finished = first.lowered, first.finished

    def source(file: str) -> SourceFile:
        return SourceFile(file=file, sha256=bundle.manifest.files[file]["sha256"])

    return EngineRecord(
        **_network(first, directory),
        directory=directory,
        target=options.target,
        product=PRODUCTS[options.target].name,
        version=finished.version,
        platform=platform_name(),
        dtype=bundle.manifest.options.dtype,
        layout=layout,
        lowering="plugins" if lowered.plugins else "standard",
        plugins=lowered.plugin_uses(),
        compute_capabilities=finished.compute_capabilities,
        flags=finished.flags,
        strip_weights=options.strip_weights,
        onnx=source(bundle.layout(layout).file),
        weights=source(lowered.weight_file()),
        options=options,
        window=first.part.window or None,
        prefill=Network(**_network(others[0], directory)) if others else None,
    )


def _network(built: Built, directory: str) -> dict[str, Any]:
    """The fields of `Network`."""
    lowered, finished = built.lowered, built.finished
    counts = finished.layers_by_type
    return {
        "engine_file": f"{directory}/{built.part.engine_file}",
        "report_file": f"{directory}/{built.part.report_file}",
        "profiles": built.part.profiles,
        "inputs": finished.inputs,
        "outputs": finished.outputs,
        "aliases": lowered.aliases(),
        "lowered_onnx_sha256": hashlib.sha256(built.lowered_onnx).hexdigest(),
        "layers": LayerCounts(
            total=sum(counts.values()),
            by_type=counts,
            kv_cache_update=counts.get("KV_CACHE_UPDATE", 0),
            attention=counts.get("ATTENTION_INPUT", 0),
            decomposed=finished.decomposed,
        ),
        "kernels": finished.kernels,
        "weight_bytes": lowered.weight_bytes(),
        "activation_bytes": finished.activation_bytes,
        "engine_weight_bytes": finished.engine_weight_bytes,
        "engine_bytes": built.engine_bytes,
        "build_seconds": round(built.seconds, 3),
        "peak_memory_bytes": finished.peak_memory_bytes,
    }
