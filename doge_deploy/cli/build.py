"""`doge-deploy build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from doge_deploy.cli.progress import progress


def _capabilities(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        return ()
    from doge_deploy.options.build import parse_capability

    try:
        return tuple(parse_capability(value) for value in values)
    except ValueError as error:
        raise click.BadParameter(f"{error}: write 8.9; repeat the option for several", context, parameter) from None


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    type=click.Choice(["trt-rtx", "trt"]),
    help="trt-rtx: compiled on the CPU, for RTX GPUs; trt: on the GPU that the engine is for.  [default: trt-rtx]",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    callback=_capabilities,
    metavar="CC",
    help="Compute capability of a GPU to build for, such as 8.9; repeatable.  [default: all that the target covers]",
)
@click.option("--batch-size", metavar="MIN,OPT,MAX", help="Rows per call: three numbers, or one.  [default: 1]")
@click.option(
    "--sequence-length",
    metavar="MIN,OPT,MAX",
    help="Tokens of a prefill: three numbers, or one.  [default: all that the bundle holds]",
)
@click.option(
    "--profiles",
    type=click.Choice(["shared", "separate"]),
    help="One optimization profile for prefill and decode, or one for each.  [default: shared for trt-rtx]",
)
@click.option(
    "--workspace-mib", type=click.IntRange(min=1), metavar="N", help="Largest scratch memory of a kernel, in MiB."
)
@click.option("--strip-weights", is_flag=True, default=None, help="Leave the weights out of the engine.")
@click.option("--plugins/--no-plugins", default=None, help="For --target trt: use plugins, or native layers only.")
@click.option(
    "--verbosity",
    type=click.Choice(["none", "names", "detailed"]),
    help="What the engine tells profilers about its layers.  [default: detailed]",
)
@click.option("--timing-cache", metavar="FILE", help="For --target trt: a file of measured kernels, read and updated.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="Options from a YAML file."
)
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change an option of the file; repeatable."
)
@click.option("--force", is_flag=True, help="Replace an engine of the same name.")
def build(bundle: Path, config_file: Path | None, assignments: tuple[str, ...], force: bool, **choices: Any) -> None:
    """Build a TensorRT engine of BUNDLE's static graph into BUNDLE.

    Exit code 3: the target cannot do what the graph needs; 4: the target's library or device is missing, or its library
    broke down.
    """
    from doge_deploy import api
    from doge_deploy.options.build import load_build_options

    options = load_build_options(config_file, choices, assignments)
    with progress() as display:
        record = api.build(bundle, options, force=force, progress=display)
    networks = record.networks
    click.echo(
        f"{bundle / record.directory}: {record.product} {record.version}, {record.dtype}, "
        f"{sum(network.engine_bytes for network in networks) / 1e6:.1f} MB, "
        f"{sum(network.build_seconds for network in networks):.1f} s, peak memory "
        f"{max(network.peak_memory_bytes for network in networks) / 1e6:.0f} MB"
    )
    if record.window is not None:
        click.echo(f"a cache of {record.window} slots, its keep_window_size: memory and time do not grow with the text")
    for network, what in zip(networks, ("", "prefill: "), strict=False):
        layers = network.layers
        click.echo(f"{what}{layers.kv_cache_update} cache writes in place, {layers.attention} native attention layers")
        if network.kernels is not None and network.kernels.low_bit:
            click.echo(f"{what}{network.kernels.low_bit} kernels read weights of few bits as they are stored")
        for reason in sorted({layer.reason for layer in layers.decomposed}):
            count = sum(layer.reason == reason for layer in layers.decomposed)
            click.echo(f"{what}{count} of them decomposed: {reason}")
