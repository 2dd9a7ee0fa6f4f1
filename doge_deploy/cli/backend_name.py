"""The value of `--backend`: an installed backend, by name."""

from __future__ import annotations

from typing import Any

import click


class BackendName(click.ParamType[str]):
    """Asks for the names when a value is checked or help is shown, and not before; loads no backend.

    Args:
        more: names that are legal beside those of installed backends.
    """

    name = "backend"

    def __init__(self, *more: str) -> None:
        self._more = more

    def _known(self) -> tuple[str, ...]:
        from doge_deploy.targets.backend import names

        return (*names(), *self._more)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self._known())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name; raises UsageError where there is no such backend, with the nearest one."""
        from doge_deploy.targets.backend import check_name

        return check_name(str(value), *self._more)
