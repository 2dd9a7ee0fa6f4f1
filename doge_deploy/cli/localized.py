"""What `verify --localize` prints: the finding in words, and the table of the layer that it is in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from doge_deploy.errors import UsageError
from doge_deploy.options.backends import DEFAULT_BACKEND

if TYPE_CHECKING:
    from doge_deploy.verify.localize.finding import Choice, Localization, Measure, Reading

_WIDTH_WITHOUT_TERMINAL = 110


def check_options(localized: bool, case: str | None, backend: str, file: Path | None) -> None:
    """Raises UsageError where options do not go with `--localize`, or need it."""
    if case is not None and not localized:
        raise UsageError(f"--case {case} says what --localize looks at; give --localize too")
    if localized and backend != DEFAULT_BACKEND:
        raise UsageError(
            f"--localize looks into graphs, and {backend} runs none that it is given; use {DEFAULT_BACKEND}"
        )
    if case is not None and file is not None:
        raise UsageError(f"{file}: with --case one case is judged, which is no report; leave out --json and the like")


def say(found: Localization) -> None:
    """Print the finding."""
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)
    rows = found.table()
    if rows:
        console.print(_table(found, rows))
    for line in found.lines():
        console.print(line, style="red" if found.finding is not None else None, highlight=False, soft_wrap=True)


def _table(found: Localization, rows: list[Reading]) -> Table:
    """A row a stage; per column what the stage makes itself, and what has come down to it."""
    from doge_deploy.verify.localize.finding import word

    finding = found.finding
    assert finding is not None
    table = Table(title=finding.place, title_justify="left")
    table.add_column("stage")
    table.add_column("reference", justify="right")
    for column in found.columns:
        for what in ("own", "of noise", "inherited"):
            table.add_column(f"{column}: {what}" if what == "own" else what, justify="right")
    stages = list(dict.fromkeys(reading.point for reading in rows))
    for point in stages:
        by_column = {reading.column: reading for reading in rows if reading.point == point}
        first = next(iter(by_column.values()))
        cells = [word(first), _scale(first)]
        for column in found.columns:
            cells += _cells(by_column.get(column))
        errs = any(reading.errs for reading in by_column.values())
        table.add_row(*cells, style="bold red" if errs else None)
    return table


def _scale(reading: Reading) -> str:
    """The reference's largest number."""
    measure = reading.own or reading.inherited
    return f"{measure.difference.scale:.2g}" if measure is not None and _is_measure(measure) else ""  # type: ignore[union-attr]


def _is_measure(one: Measure | Choice) -> bool:
    return hasattr(one, "difference")


def _cells(reading: Reading | None) -> list[str]:
    if reading is None:
        return ["", "", ""]
    own = "fused"
    share = ""
    if reading.own is not None and _is_measure(reading.own):
        own, share = f"{reading.own.error:.1e}", f"{reading.own.load:.0%}"  # type: ignore[union-attr]
        if reading.own.load > 99:  # type: ignore[union-attr]
            share = f"{reading.own.load:.0f}x"  # type: ignore[union-attr]
    elif reading.own is not None:
        own, share = (f"{reading.own.rows} rows" if reading.own.rows else "same"), ""  # type: ignore[union-attr]
    inherited = f"{reading.inherited.error:.1e}" if reading.inherited is not None else ""
    return [own, share, inherited]
