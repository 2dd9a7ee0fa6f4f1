"""What the options of a build come to for one product and one bundle."""

from __future__ import annotations

from doge_deploy.bundle.opening import Bundle
from doge_deploy.devices.tensorrt_limits import RTX_PORTABLE
from doge_deploy.devices.versions import at_least
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.graph.weight_formats import format_of
from doge_deploy.options.build import BuildOptions
from doge_deploy.targets.trt.acceptance import refusals
from doge_deploy.targets.trt.vendor import PRODUCTS, device_capability


def check_options(options: BuildOptions) -> None:
    """Raises UsageError where an option has no meaning for the product."""
    product = PRODUCTS[options.target]
    if options.timing_cache is not None and not product.needs_gpu:
        raise UsageError(
            f"timing_cache={options.timing_cache!r}: {product.name} measures no kernels while it builds; only "
            "--target trt does"
        )


def check_model(bundle: Bundle, options: BuildOptions) -> None:
    """Raises UnsupportedModelError where the product cannot build an engine of the bundle's model, and UsageError where
    it could not be seen what became of its weights.
    """
    from doge_deploy.kernels.registry import installed

    manifest = bundle.manifest
    found = refusals(
        manifest.facts,
        target=options.target,
        dtype=manifest.dtype,
        max_length=manifest.max_length,
        routing=manifest.options.routing,
        weight_format=format_of(manifest.options),
        inlined=manifest.options.inline_functions,
        plugins=installed() if PRODUCTS[options.target].has_plugins and options.plugins else None,
    )
    for refusal in found:
        raise UnsupportedModelError(f"{bundle.path}: {refusal.reason}; {refusal.remedy}")
    if manifest.options.quantize is not None and options.verbosity != "detailed":
        raise UsageError(
            f"verbosity={options.verbosity} with {manifest.options.quantize} weights: whether kernels read them as "
            "they are stored shows in the builder's list, which comes with verbosity=detailed only"
        )


def resolve_capabilities(bundle: Bundle, options: BuildOptions) -> tuple[str, ...]:
    """The compute capabilities to build for: those asked for; with TensorRT that of the device that is there. Weights
    that not all of them can compute with narrow what the product covers where nothing is asked for.

    Raises:
        UsageError: TensorRT is asked to build for another device, or weights need a later one.
        MissingDependencyError: TensorRT is to build, and there is no device.
    """
    weights = format_of(bundle.manifest.options)
    first, name = ("", "") if weights is None else (weights.first_capability, weights.name)
    if not PRODUCTS[options.target].needs_gpu:
        asked = options.compute_capabilities
        if first and not asked:
            return tuple(one for one in RTX_PORTABLE if at_least(one, first))
        if older := [one for one in asked if first and not at_least(one, first)]:
            raise UsageError(
                f"compute_capabilities={', '.join(older)}: {name} weights need compute capability {first} or later"
            )
        return asked
    here = device_capability()
    if first and not at_least(here, first):
        raise UsageError(
            f"the device of this machine has compute capability {here}: {name} weights need {first} or later"
        )
    if options.compute_capabilities not in ((), (here,)):
        given = ", ".join(options.compute_capabilities)
        raise UsageError(
            f"compute_capabilities={given}: TensorRT builds for the device of this machine, which is {here}"
        )
    return (here,)


def engine_name(bundle: Bundle, options: BuildOptions, capabilities: tuple[str, ...]) -> str:
    """`<target>-<dtype>-<capabilities>`, such as `trt-rtx-fp16-sm89`; `portable` where none was asked for."""
    caps = "+".join("sm" + capability.replace(".", "") for capability in capabilities) or "portable"
    standard = "-no-plugins" if PRODUCTS[options.target].has_plugins and not options.plugins else ""
    return f"{options.target}-{bundle.manifest.options.dtype}-{caps}{standard}"
