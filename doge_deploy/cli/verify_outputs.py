"""The files that `verify` writes, and their options."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from doge_deploy.verify.report import Report


@dataclass(frozen=True)
class _Output:
    option: str
    help: str
    write: Callable[[Report, Path], None]


def _json(report: Report, path: Path) -> None:
    from doge_deploy.verify.files import write_json

    write_json(report, path)


def _junit(report: Report, path: Path) -> None:
    from doge_deploy.verify.files import write_junit

    write_junit(report, path)


def _markdown(report: Report, path: Path) -> None:
    from doge_deploy.verify.markdown import write_markdown

    write_markdown(report, path)


def _html(report: Report, path: Path) -> None:
    from doge_deploy.verify.page.write import write_html

    write_html(report, path)


def _node_data(report: Report, path: Path) -> None:
    from doge_deploy.verify.node_data import write_node_data

    write_node_data(report, path)


_OUTPUTS = (
    _Output("json", "Write every number here; a later run can take it for its --baseline.", _json),
    _Output("junit", "Write a JUnit report here.", _junit),
    _Output("html", "Write a page for people here: one file, no network, no script.", _html),
    _Output("markdown", "Write a summary here; to the file of $GITHUB_STEP_SUMMARY it is appended.", _markdown),
    _Output("node-data", "Write colours for the graph in Model Explorer here.", _node_data),
)


@dataclass(frozen=True)
class Outputs:
    """What a user asked for: option -> file."""

    files: dict[str, Path]

    @property
    def first(self) -> Path | None:
        """One of the files, for a message; None where there is none."""
        return next(iter(self.files.values()), None)

    def check(self) -> None:
        """Told before the work rather than after it.

        Raises:
            UsageError: a file could not be written.
            MissingDependencyError: a package is missing that writes one of them.
        """
        from doge_deploy.devices import packages
        from doge_deploy.verify.files import check_writable

        if "node-data" in self.files:
            packages.require_graph_packages("verify --node-data")
        for path in self.files.values():
            check_writable(path)

    def write(self, report: Report) -> None:
        """Raises UsageError where a file cannot be written."""
        for output in _OUTPUTS:
            if output.option in self.files:
                output.write(report, self.files[output.option])


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each file, and their values as `outputs`."""

    @functools.wraps(command)
    def collected(*arguments: Any, **values: Any) -> Any:
        files = {output.option: values.pop(f"{output.option.replace('-', '_')}_file") for output in _OUTPUTS}
        return command(*arguments, outputs=Outputs({name: path for name, path in files.items() if path}), **values)

    decorated: Callable[..., Any] = collected
    for output in reversed(_OUTPUTS):
        name = f"{output.option.replace('-', '_')}_file"
        path = click.Path(path_type=Path)
        decorated = click.option(f"--{output.option}", name, type=path, metavar="FILE", help=output.help)(decorated)
    return decorated


def command_line(context: click.Context) -> str:
    """The command that was given, without the files that it writes, as a shell takes it."""
    written = {f"--{output.option}" for output in _OUTPUTS}
    words = context.command_path.split()
    for parameter in context.command.params:
        name, option = str(parameter.name), parameter.opts[0]
        value: Any = context.params.get(name)
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif context.get_parameter_source(name) == ParameterSource.COMMANDLINE and option not in written:
            values = value if isinstance(value, tuple) else (value,)
            words += [option] if isinstance(value, bool) else [word for one in values for word in (option, str(one))]
    return shlex.join(words)
