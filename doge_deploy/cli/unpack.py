"""`doge-deploy unpack`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("unpack")
@click.argument("archive", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="BUNDLE", help="The new bundle."
)
@click.option("--sha256", metavar="HEX", help="Refuse an archive of another hash than this one, which `pack` printed.")
@click.option("--force", is_flag=True, help="Replace the bundle that is there.")
def unpack(archive: Path, output: Path, sha256: str | None, force: bool) -> None:
    """Make a bundle of ARCHIVE, which `pack` wrote, and check every byte.

    Nothing is written outside of the new bundle, and nothing is left of it where the archive turns out to be broken.

    Exit code 3: the archive is not whole, was altered, or holds what its manifest does not name.
    """
    from doge_deploy import api

    made = api.unpack(archive, output, sha256=sha256, force=force)
    files = made.manifest.files
    total = sum(entry["bytes"] for entry in files.values())
    click.echo(f"{output}: {len(files)} files, {total / 1e6:.1f} MB, every sha256 as in the manifest")
