"""What runs a bundle and how: the options that `generate` and `serve` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from doge_deploy.cli.backend_name import BackendName
from doge_deploy.options.backends import DEFAULT_BACKEND

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--backend", type=BackendName(), default=DEFAULT_BACKEND, show_default=True, help="What runs the bundle."
    ),
    click.option("--engine", metavar="NAME", help="Which engine, where the backend has several."),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="Threads, at most one per CPU. Default: one per core.",
    ),
    click.option(
        "--spin",
        type=click.IntRange(min=0),
        metavar="US",
        help="Microseconds that idle threads wait actively before they sleep.",
    ),
    click.option(
        "--speculate/--no-speculate", default=True, show_default=True, help="Guess tokens when that saves time."
    ),
)


def runtime_options(command: Command) -> Command:
    """Adds backend, engine, threads, spin and speculate."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
