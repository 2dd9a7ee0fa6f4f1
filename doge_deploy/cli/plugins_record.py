"""`doge-deploy plugins record` and `plugins verify`."""

from __future__ import annotations

from pathlib import Path

import click

from doge_deploy.dtypes import NAMES


@click.command("record")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The new file.")
@click.option("--arch", "archs", metavar="LIST", required=True, help="Compute capabilities: sm_87,sm_120.")
@click.option("--model", metavar="MODEL", help="Compile for this checkpoint's sizes. Default: the published models'.")
@click.option(
    "--dtype", type=click.Choice(tuple(NAMES)), default="fp16", show_default=True, help="Dtype of the tensors."
)
def record_command(output: Path, archs: str, model: str | None, dtype: str) -> None:
    """Write compiled kernels, inputs and expected outputs into a file for `plugins verify`.

    It needs no GPU: the kernels run in Triton's interpreter, which TRITON_INTERPRET=1 asks for.
    """
    from doge_deploy.devices.packages import require_packages
    from doge_deploy.kernels.devices import parse_arch
    from doge_deploy.kernels.samples import Model, published
    from doge_deploy.verify.files import check_writable

    require_packages(("triton",), user="plugins record", extra="plugins")
    require_packages(("torch",), user="plugins record", extra="export")
    chosen = [parse_arch(part) for part in archs.split(",") if part.strip()]
    check_writable(output)
    if model is None:
        sizes = published(128)
    else:
        from doge_deploy.checkpoint import open_checkpoint

        sizes = Model.of(open_checkpoint(model).facts)
    from doge_deploy.verify.kernels.record import record_kernels

    recording, digest = record_kernels(
        output,
        sizes,
        dtype=NAMES[dtype],
        archs=chosen,
        started=lambda what: click.echo(f"{what} ...", err=True),
    )
    kernels = {launch.ptx for node in recording.nodes for launch in node.launches}
    size = output.stat().st_size / 1e6
    click.echo(f"{output}: {len(recording.nodes)} nodes, {len(kernels)} kernels, {size:.1f} MB, sha256 {digest}")


@click.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
def verify_command(file: Path) -> None:
    """Run the kernels of FILE on this machine's CUDA device, compare what comes out, and time them.

    FILE is one that `plugins record` wrote. It needs cuda-core alone, neither Triton nor PyTorch nor TensorRT.

    Exit code 0: every number is within its tolerance; 1: one is not.
    """
    from doge_deploy.verify.kernels.__main__ import verify_on_device

    verify_on_device(file)
