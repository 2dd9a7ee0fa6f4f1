"""`doge-deploy bisect`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("bisect")
@click.argument("good", type=click.Path(path_type=Path))
@click.argument("bad", type=click.Path(path_type=Path))
@click.option("--good-python", metavar="PYTHON", help="The interpreter of the environment that GOOD is run in.")
@click.option("--bad-python", metavar="PYTHON", help="The interpreter of the environment that BAD is run in.")
def bisect(good: Path, bad: Path, good_python: str | None, bad_python: str | None) -> None:
    """Name the first weight, pass or package that makes BAD compute something else than GOOD.

    Both are bundles of one checkpoint, which is not needed; with two interpreters they may be the same bundle.

    Exit code 0: both compute the same; 1: they do not.
    """
    from rich.console import Console

    from doge_deploy import api

    console, errors = Console(), Console(stderr=True)
    found = api.bisect(
        good,
        bad,
        good_python=good_python,
        bad_python=bad_python,
        started=lambda what: errors.print(f"{what} ...", highlight=False),
    )
    if found is None:
        console.print(f"{bad} computes what {good} computes", highlight=False, soft_wrap=True)
        return
    for line in found.lines():
        console.print(line, style="red", highlight=False, soft_wrap=True)
    found.refuse(good, bad)
