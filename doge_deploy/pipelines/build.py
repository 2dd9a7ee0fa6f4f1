"""A bundle in, an engine out: the order of a build, and nothing else."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from doge_deploy.bundle.engine_record import ENGINES, EngineRecord, LayerCounts, PluginUse, SourceFile
from doge_deploy.bundle.engine_store import commit, staging
from doge_deploy.bundle.manifest import Bundle, Layout, open_bundle
from doge_deploy.devices.host import platform_name
from doge_deploy.errors import MissingDependencyError, UnsupportedModelError, UsageError
from doge_deploy.options.build import BuildOptions
from doge_deploy.targets.trt.job import EVENTS, Failed, Finished, Job
from doge_deploy.targets.trt.job import Progress as Told
from doge_deploy.targets.trt.profiles import make_profiles
from doge_deploy.targets.trt.vendor import (
    PRODUCTS,
    Product,
    check_installed,
    device_capability,
    require_gpu,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from doge_deploy.targets.trt.plugins import PluginLowering

LAYOUT = "static"
ENGINE_FILE, REPORT_FILE = "model.engine", "layers.json"

WORKER = (sys.executable, "-m", "doge_deploy.targets.trt.worker")

_LOG_LINES = 3
"""Lines of the vendor's log that are quoted where its library ended the process."""

_ERRORS = {"usage": UsageError, "unsupported": UnsupportedModelError, "missing": MissingDependencyError}


class Progress(Protocol):
    """What `build` tells about itself: stages in order, each with an amount of work."""

    def stage(self, name: str, total: int = 1) -> Callable[[int], None]:
        """Start a stage of `total` units; returns what is to be called with units done."""


def build(path: str | Path, options: BuildOptions, *, force: bool, progress: Progress) -> EngineRecord:
    """Build an engine of the bundle's static graph into the bundle.

    Args:
        path: the bundle.
        options: what the user chose.
        force: replace an engine of the same name.
        progress: told what is being done.

    Raises:
        UsageError: the options do not fit the bundle or the product, or the engine exists.
        UnsupportedModelError: the product cannot build this graph. BrokenBundleError: the bundle is broken.
        MissingDependencyError: the product, a device or a plugin is missing, or the vendor's library broke down.
    """
    product = PRODUCTS[options.target]
    _check_options(options, product)
    check_installed(options.target)
    require_gpu(options.target)
    advance = progress.stage("check bundle")
    bundle = open_bundle(path)
    layout = bundle.layout(LAYOUT)
    _check_weights(bundle)
    advance(1)
    capabilities = _capabilities(options)
    name = engine_name(bundle, options, capabilities)
    if name in bundle.manifest.engines and not force:
        raise UsageError(f"{bundle.path} has an engine {name}; replace it with --force")
    profiles = make_profiles(options, bundle.manifest.max_length, options.profiles or product.default_profiles)
    advance = progress.stage("lower graph")
    lowered, plugins = lower_layout(bundle, layout, use_plugins=product.has_plugins and options.plugins)
    aliases = cache_aliases(lowered)
    data = serialize(lowered)
    advance(1)
    with staging(bundle) as aside:
        (aside / "lowered.onnx").write_bytes(data)
        job = Job(
            target=options.target,
            parent_pid=os.getpid(),
            onnx_file=str(aside / "lowered.onnx"),
            weights_beside=str(bundle.path / layout.file),
            engine_file=str(aside / ENGINE_FILE),
            report_file=str(aside / REPORT_FILE),
            profiles=profiles,
            axes={spec.name: spec.shape for spec in (*layout.signature.inputs, *layout.signature.outputs)},
            compute_capabilities=capabilities,
            allow_tf32=False,
            workspace_bytes=None if options.workspace_mib is None else options.workspace_mib << 20,
            strip_weights=options.strip_weights,
            verbosity=options.verbosity,
            timing_cache=options.timing_cache,
            plugins=tuple(plugin.operator for plugin in plugins),
        )
        start = time.perf_counter()
        finished = run_job(job, aside, product, progress)
        seconds = time.perf_counter() - start
        (aside / "lowered.onnx").unlink()
        directory = f"{ENGINES}/{name}"
        counts = finished.layers_by_type
        record = EngineRecord(
            directory=directory,
            engine_file=f"{directory}/{ENGINE_FILE}",
            report_file=f"{directory}/{REPORT_FILE}",
            target=options.target,
            product=product.name,
            version=finished.version,
            platform=platform_name(),
            dtype=bundle.manifest.options["dtype"],
            layout=LAYOUT,
            lowering="plugins" if plugins else "standard",
            plugins=_plugin_uses(lowered, plugins),
            compute_capabilities=finished.compute_capabilities,
            flags=finished.flags,
            strip_weights=options.strip_weights,
            profiles=profiles,
            inputs=finished.inputs,
            outputs=finished.outputs,
            aliases=aliases,
            onnx=_source(bundle, layout.file),
            weights=_source(bundle, _weight_file(lowered)),
            lowered_onnx_sha256=hashlib.sha256(data).hexdigest(),
            options=options,
            layers=LayerCounts(
                total=sum(counts.values()),
                by_type=counts,
                kv_cache_update=counts.get("KV_CACHE_UPDATE", 0),
                attention=counts.get("ATTENTION_INPUT", 0),
                decomposed=finished.decomposed,
            ),
            kernels=finished.kernels,
            weight_bytes=weight_bytes(lowered),
            activation_bytes=finished.activation_bytes,
            engine_weight_bytes=finished.engine_weight_bytes,
            engine_bytes=(aside / ENGINE_FILE).stat().st_size,
            build_seconds=round(seconds, 3),
            peak_memory_bytes=finished.peak_memory_bytes,
        )
        commit(bundle, aside, record)
    return record


def _check_options(options: BuildOptions, product: Product) -> None:
    if options.timing_cache is not None and not product.needs_gpu:
        raise UsageError(
            f"timing_cache={options.timing_cache!r}: {product.name} measures no kernels while it builds; only "
            "--target trt does"
        )


def _check_weights(bundle: Bundle) -> None:
    quantize = bundle.manifest.options.get("quantize")
    if quantize:
        raise UnsupportedModelError(
            f"{bundle.path} stores its weights as {quantize}; engines are built of fp32, fp16 or bf16: export without "
            "--quantize"
        )


def _capabilities(options: BuildOptions) -> tuple[str, ...]:
    """Those asked for; TensorRT builds for the device that is there and no other."""
    if not PRODUCTS[options.target].needs_gpu:
        return options.compute_capabilities
    here = device_capability()
    if options.compute_capabilities not in ((), (here,)):
        asked = ", ".join(options.compute_capabilities)
        raise UsageError(
            f"compute_capabilities={asked}: TensorRT builds for the device of this machine, which is {here}"
        )
    return (here,)


def engine_name(bundle: Bundle, options: BuildOptions, capabilities: tuple[str, ...]) -> str:
    """`<target>-<dtype>-<capabilities>`, such as `trt-rtx-fp16-sm89`; `portable` where none was asked for."""
    caps = "+".join("sm" + capability.replace(".", "") for capability in capabilities) or "portable"
    standard = "-no-plugins" if PRODUCTS[options.target].has_plugins and not options.plugins else ""
    return f"{options.target}-{bundle.manifest.options['dtype']}-{caps}{standard}"


def lower_layout(bundle: Bundle, layout: Layout, *, use_plugins: bool) -> tuple[ir.Model, list[PluginLowering]]:
    """The graph that the vendor's parser gets, and the plugins in it.

    Raises:
        UnsupportedModelError: the graph has what the product cannot do, or a node does not fit its plugin.
        MissingDependencyError: a plugin is missing.
    """
    import onnx_ir as ir

    from doge_deploy.graph.preflight import require_plugins
    from doge_deploy.kernels.registry import installed
    from doge_deploy.targets.trt.lowering import lower
    from doge_deploy.targets.trt.plugins import plugins_for

    model = ir.load(bundle.path / layout.file)
    if not use_plugins:
        return lower(model), []
    registry = installed()
    plugins = plugins_for({node.op_type for node in model.graph if node.domain == "doge"}, registry)
    lowered = lower(model, plugins)
    require_plugins(lowered, registry)
    return lowered, plugins


def serialize(model: ir.Model) -> bytes:
    """The model as an ONNX file; weights stay where they are."""
    import onnx_ir as ir

    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def cache_aliases(model: ir.Model) -> dict[str, str]:
    """Present outputs that TensorScatter writes, with the past inputs whose buffers they are."""
    inputs = {value.name for value in model.graph.inputs}
    aliases = {}
    for value in model.graph.outputs:
        node = value.producer()
        if node is not None and node.op_type == "TensorScatter" and node.inputs[0] is not None:
            past = node.inputs[0].name
            if past in inputs and value.name is not None and past is not None:
                aliases[value.name] = past
    return aliases


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the weights that the graph refers to, each once."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _weight_file(model: ir.Model) -> str:
    """The file that holds the external data."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            return str(value.const_value.location)
    raise UnsupportedModelError("the graph has no external weights")


def _source(bundle: Bundle, file: str) -> SourceFile:
    return SourceFile(file=file, sha256=bundle.manifest.files[file]["sha256"])


def _plugin_uses(model: ir.Model, plugins: list[PluginLowering]) -> tuple[PluginUse, ...]:
    counts = Counter(node.op_type for node in model.graph)
    return tuple(
        PluginUse(name=name, version=plugin.version, namespace=plugin.namespace, layers=counts[name])
        for plugin in plugins
        for name in sorted(plugin.plugin_names)
        if counts[name]
    )


def run_job(job: Job, folder: Path, product: Product, progress: Progress) -> Finished:
    """Build in a process of its own, which ends with this one.

    Raises:
        UsageError, UnsupportedModelError, MissingDependencyError: what the process reports, or that it broke down.
    """
    (folder / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
    log_file = folder / "log.txt"
    advance = progress.stage("build engine", total=1000)
    command = [*WORKER, str(folder / "job.json")]
    result: Finished | Failed | None = None
    told = 0
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8")
        try:
            assert process.stdout is not None
            for line in process.stdout:
                event = EVENTS.validate_json(line)
                if isinstance(event, Told):
                    now = int(event.fraction * 1000)
                    advance(now - told)
                    told = now
                else:
                    result = event
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    if isinstance(result, Failed):
        raise _ERRORS[result.kind](result.message)
    if result is None or status != 0:
        raise MissingDependencyError(_breakdown(product, status, log_file))
    advance(1000 - told)
    for file in (log_file, folder / "job.json"):
        file.unlink()
    return result


def _breakdown(product: Product, status: int, log_file: Path) -> str:
    """One line about a process that ended without a result."""
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = [
        line.strip() for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    ]
    last = " | ".join(lines[-_LOG_LINES:]) or "nothing"
    return f"the library of {product.name} broke down: its process {ended}; its last words: {last}"
