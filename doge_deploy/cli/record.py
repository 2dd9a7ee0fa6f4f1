"""`doge-deploy record`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("record")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The new file.")
@click.option("--reference", metavar="MODEL", help="The checkpoint. Default: the one that the bundle names.")
@click.option("--adapter", metavar="DIRECTORY", help="The merged adapter. Default: the one that the bundle names.")
@click.option("--layout", "layouts", multiple=True, metavar="static|growing", help="Only this layout; repeatable.")
@click.option("--greedy-steps", type=click.IntRange(min=1), default=128, show_default=True, metavar="N")
def record(
    bundle: Path,
    output: Path,
    reference: str | None,
    adapter: str | None,
    layouts: tuple[str, ...],
    greedy_steps: int,
) -> None:
    """Record the answers of BUNDLE's reference to the calls of `verify`.

    Where only the bundle is, `verify BUNDLE --recording FILE` then judges it by that file, with neither torch nor
    transformers nor the checkpoint. The bundle is not run here. The same input gives the same file.
    """
    from doge_deploy.devices.packages import require_export_packages
    from doge_deploy.verify.files import check_writable

    require_export_packages("record")
    check_writable(output)
    write_recording(bundle, output, reference=reference, adapter=adapter, layouts=layouts, greedy_steps=greedy_steps)


def write_recording(bundle: Path, output: Path, **options: Any) -> None:
    """Record, say what is being done, and how large the file is; `options` are those of `doge_deploy.record`."""
    from doge_deploy import api

    digest = api.record(bundle, output, started=lambda what: click.echo(f"{what} ...", err=True), **options)
    click.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB, sha256 {digest}")
