"""`doge-deploy pack`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("pack")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The new archive.")
@click.option("--engine", "engines", multiple=True, metavar="NAME", help="Only this engine; repeatable. Default: all.")
@click.option("--level", type=int, metavar="1-22", help="Of Zstandard: 1 is fastest, 22 smallest.  [default: 12]")
def pack(bundle: Path, output: Path, engines: tuple[str, ...], level: int | None) -> None:
    """Write BUNDLE with its engines into one compressed file, to be carried to a device.

    Every file is compared with the manifest's hashes first. The same bundle gives the same archive. `unpack` makes a
    bundle of it again; any tar that knows Zstandard opens it too.
    """
    from doge_deploy import api
    from doge_deploy.bundle.archive import DEFAULT_LEVEL

    made = api.pack(bundle, output, level=DEFAULT_LEVEL if level is None else level, engines=engines)
    click.echo(
        f"{made.path}: {made.bytes / 1e6:.1f} MB, {made.bytes / made.bundle_bytes:.2f} of the bundle's "
        f"{made.bundle_bytes / 1e6:.1f} MB, sha256 {made.sha256}"
    )
