"""The record of a built engine, as the manifest holds it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from doge_deploy.bundle.engine_record import ENGINES, EngineRecord, LayerCounts, SourceFile
from doge_deploy.bundle.opening import Bundle
from doge_deploy.devices.host import platform_name
from doge_deploy.options.build import BuildOptions
from doge_deploy.targets.trt.job import Finished, Job
from doge_deploy.targets.trt.vendor import PRODUCTS

if TYPE_CHECKING:  # brings onnx_ir, whose absence `build` reports
    from doge_deploy.targets.trt.layout import LoweredLayout

ENGINE_FILE, REPORT_FILE = "model.engine", "layers.json"
"""Names of an engine's files in its folder."""


def make_record(
    bundle: Bundle,
    *,
    name: str,
    layout: str,
    options: BuildOptions,
    job: Job,
    lowered: LoweredLayout,
    lowered_onnx: bytes,
    finished: Finished,
    engine_bytes: int,
    seconds: float,
) -> EngineRecord:
    """What is known of an engine once it is built.

    Args:
        bundle: what it is built of, and into.
        name: of the engine.
        layout: name of the layout it was built of.
        options: what the user chose.
        job: what was asked of the process that built it.
        lowered: the graph that the parser got.
        lowered_onnx: the same, serialized.
        finished: what that process found out.
        engine_bytes: size of the engine's file.
        seconds: wall time of the build.
    """
    directory, counts = f"{ENGINES}/{name}", finished.layers_by_type

    def source(file: str) -> SourceFile:
        return SourceFile(file=file, sha256=bundle.manifest.files[file]["sha256"])

    return EngineRecord(
        directory=directory,
        engine_file=f"{directory}/{ENGINE_FILE}",
        report_file=f"{directory}/{REPORT_FILE}",
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
        profiles=job.profiles,
        inputs=finished.inputs,
        outputs=finished.outputs,
        aliases=lowered.aliases(),
        onnx=source(bundle.layout(layout).file),
        weights=source(lowered.weight_file()),
        lowered_onnx_sha256=hashlib.sha256(lowered_onnx).hexdigest(),
        options=options,
        layers=LayerCounts(
            total=sum(counts.values()),
            by_type=counts,
            kv_cache_update=counts.get("KV_CACHE_UPDATE", 0),
            attention=counts.get("ATTENTION_INPUT", 0),
            decomposed=finished.decomposed,
        ),
        kernels=finished.kernels,
        weight_bytes=lowered.weight_bytes(),
        activation_bytes=finished.activation_bytes,
        engine_weight_bytes=finished.engine_weight_bytes,
        engine_bytes=engine_bytes,
        build_seconds=round(seconds, 3),
        peak_memory_bytes=finished.peak_memory_bytes,
    )
