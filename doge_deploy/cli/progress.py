"""Progress of a long command: a live display on a terminal, plain lines elsewhere; on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class PlainProgress:
    """One line per finished stage, for logs."""

    def __init__(self) -> None:
        self._current: tuple[str, float] | None = None

    def stage(self, name: str, total: int = 1) -> Callable[[int], None]:
        self.finish()
        self._current = (name, time.perf_counter())
        return lambda done: None

    def finish(self) -> None:
        if self._current is not None:
            name, start = self._current
            click.echo(f"{name}: {time.perf_counter() - start:.1f} s", err=True)
        self._current = None


class LiveProgress:
    """A bar per stage, drawn by rich."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def stage(self, name: str, total: int = 1) -> Callable[[int], None]:
        self.finish()
        task: TaskID = self._bars.add_task(name, total=max(total, 1))

        def advance(done: int) -> None:
            self._bars.advance(task, done)

        return advance

    def finish(self) -> None:
        for task in self._bars.tasks:
            self._bars.update(task.id, completed=task.total)


@contextlib.contextmanager
def progress() -> Iterator[PlainProgress | LiveProgress]:
    """The display that fits standard error."""
    if not sys.stderr.isatty():
        plain = PlainProgress()
        yield plain
        plain.finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        live = LiveProgress(bars)
        yield live
        live.finish()
