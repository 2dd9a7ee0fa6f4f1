"""A bundle in, an engine out: the order of a build, and nothing else."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

from doge_deploy.bundle.engine_record import EngineRecord
from doge_deploy.bundle.engine_store import commit, staging
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.devices.packages import require_graph_packages
from doge_deploy.errors import UsageError
from doge_deploy.options.build import BuildOptions
from doge_deploy.process.progress import Progress
from doge_deploy.targets.trt.choices import check_model, check_options, engine_name, resolve_capabilities
from doge_deploy.targets.trt.job import make_job
from doge_deploy.targets.trt.parts import Part, make_parts
from doge_deploy.targets.trt.record import Built, make_record
from doge_deploy.targets.trt.run import run_job
from doge_deploy.targets.trt.vendor import PRODUCTS, check_installed, require_gpu

LAYOUT = "static"
LOWERED_FILE = "lowered.onnx"


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
    check_options(options)
    check_installed(options.target)
    require_graph_packages("build")
    require_gpu(options.target)
    advance = progress.stage("check bundle")
    bundle = open_bundle(path)
    layout = bundle.layout(LAYOUT)
    check_model(bundle, options)
    advance(1)
    capabilities = resolve_capabilities(bundle, options)
    name = engine_name(bundle, options, capabilities)
    if name in bundle.manifest.engines and not force:
        raise UsageError(f"{bundle.path} has an engine {name}; replace it with --force")
    use_plugins = product.has_plugins and options.plugins
    kind = options.profiles or product.default_profiles
    parts = make_parts(bundle, layout.signature, options, kind, use_plugins=use_plugins)
    # Before anything lies on the disk: a signal while onnx's compiled part is initialised ends the process at once.
    importlib.import_module("doge_deploy.targets.trt.layout")
    with staging(bundle) as aside:
        built = [_build_part(bundle, part, options, capabilities, use_plugins, aside, progress) for part in parts]
        record = make_record(bundle, name=name, layout=LAYOUT, options=options, built=built)
        commit(bundle, aside, record)
    return record


def _build_part(
    bundle: Bundle,
    part: Part,
    options: BuildOptions,
    capabilities: tuple[str, ...],
    use_plugins: bool,
    aside: Path,
    progress: Progress,
) -> Built:
    """One network: lowered, and built into the folder `aside`."""
    from doge_deploy.targets.trt.layout import lower_layout

    layout = bundle.layout(LAYOUT)
    advance = progress.stage("lower graph")
    lowered = lower_layout(bundle, layout, use_plugins=use_plugins, bounded=part.bounded_pass())
    data = lowered.serialized()
    advance(1)
    (aside / LOWERED_FILE).write_bytes(data)
    job = make_job(
        options,
        onnx_file=aside / LOWERED_FILE,
        weights_beside=bundle.path / layout.file,
        engine_file=aside / part.engine_file,
        report_file=aside / part.report_file,
        profiles=part.profiles,
        signature=part.signature,
        compute_capabilities=capabilities,
        plugins=tuple(plugin.operator for plugin in lowered.plugins),
        low_bit_numbers=lowered.low_bit_numbers(),
    )
    start = time.perf_counter()
    finished = run_job(job, progress)
    seconds = time.perf_counter() - start
    (aside / LOWERED_FILE).unlink()
    return Built(part, lowered, data, finished, (aside / part.engine_file).stat().st_size, seconds)
