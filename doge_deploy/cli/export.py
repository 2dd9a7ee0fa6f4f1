"""`doge-deploy export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from doge_deploy.cli.progress import progress
from doge_deploy.cli.rare_collections import rare_collections
from doge_deploy.cli.record import write_recording
from doge_deploy.dtypes import NAMES
from doge_deploy.graph.weight_formats import weight_formats

_FORMATS = weight_formats()

_DEFAULT_BLOCKS = ", ".join(
    f"{known.default_block_size} with {name}" for name, known in _FORMATS.items() if known.default_block_size
)

_CALIBRATED = {
    name: f"{name} in {' and '.join(known.calibrated_dtypes)}"
    for name, known in _FORMATS.items()
    if known.calibrated_dtypes is not None
}


@click.command("export")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the new bundle.")
@click.option(
    "--task",
    type=click.Choice(["causal-lm", "sequence-classification", "features"]),
    help="What the bundle is for.  [default: causal-lm]",
)
@click.option("--dtype", type=click.Choice(tuple(NAMES)), help="Dtype of weights and caches.  [default: fp32]")
@click.option(
    "--kv-cache",
    multiple=True,
    type=click.Choice(["static", "growing"]),
    help="Cache layout; give it twice for a bundle that holds both.  [default: static]",
)
@click.option("--max-length", type=click.IntRange(min=1), metavar="N", help="Tokens a row can hold.")
@click.option(
    "--routing",
    type=click.Choice(["reference", "per-token"]),
    help="How a mixture of experts chooses: as transformers does, or each token alone.  [default: reference]",
)
@click.option(
    "--logits", type=click.Choice(["last", "all"]), help="Which tokens of a call have logits.  [default: last]"
)
@click.option(
    "--quantize",
    type=click.Choice(tuple(_FORMATS)),
    help=f"Store weights in fewer bits: {'; '.join(f'{name}, {known.title}' for name, known in _FORMATS.items())}.",
)
@click.option(
    "--block-size",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"At most this many numbers share a scale.  [default: {_DEFAULT_BLOCKS}]",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Zero is the middle of the range, or each block has a zero point.  [default: symmetric]",
)
@click.option(
    "--calibrate/--no-calibrate",
    default=None,
    help=f"Choose numbers of {' and '.join(_CALIBRATED)} by what the model does with a text, as GPTQ does.  "
    f"[default: with {', '.join(_CALIBRATED.values())}]",
)
@click.option(
    "--inline-functions",
    is_flag=True,
    default=None,
    help="Write graphs without local functions, for runtimes that read none.",
)
@click.option(
    "--lower-for",
    multiple=True,
    metavar="BACKEND",
    help="Also write the graph as this backend runs it, and say what of it would run elsewhere: cuda.",
)
@click.option("--num-layers", type=click.IntRange(min=1), metavar="N", help="Only the first N layers (to debug).")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="Options from a YAML file."
)
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change an option of the file; repeatable."
)
@click.option("--adapter", metavar="DIRECTORY", help="Merge this PEFT LoRA adapter; a Hub id works too.")
@click.option(
    "--calibration-text",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Text for formats that are calibrated.  [default: the checkpoint's calibration.txt, or the tool's own]",
)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write a recording of the reference, as `doge-deploy record` does.",
)
@click.option("--strict", is_flag=True, help="Refuse keys of config.json that transformers ignores.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def export(
    model: str,
    output: Path,
    config_file: Path | None,
    assignments: tuple[str, ...],
    adapter: str | None,
    calibration_text: Path | None,
    record: Path | None,
    strict: bool,
    force: bool,
    **choices: Any,
) -> None:
    """Trace MODEL to the ONNX bundle OUTPUT.

    MODEL is a directory, a Hub id (owner/name), or one of the bundled doge-tiny and doge-tiny-moe.
    """
    from doge_deploy import api
    from doge_deploy.options.export import load_export_options

    if record is not None:
        from doge_deploy.verify.files import check_writable

        check_writable(record)
    options = load_export_options(config_file, choices, assignments)
    with rare_collections(), progress() as display:
        manifest = api.export(
            model,
            output,
            options,
            adapter=adapter,
            strict=strict,
            force=force,
            progress=display,
            calibration_text=calibration_text,
        ).manifest
    for warning in manifest.warnings:
        click.echo(f"warning: {warning}", err=True)
    for layout in manifest.layouts.values():
        for name in options.lower_for:
            for what, why in layout.lowered[name].declined.items() if name in layout.lowered else ():
                click.echo(f"warning: {layout.file} for {name}: {what}: {why}", err=True)
    size = sum(entry["bytes"] for entry in manifest.files.values())
    kind = options.dtype if options.quantize is None else f"{options.quantize} weights"
    click.echo(f"{output}: {', '.join(manifest.layouts)}, {kind}, {size / 1e6:.1f} MB")
    if record is not None:
        write_recording(output, record, reference=model, adapter=adapter)
