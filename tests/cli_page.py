"""docs/cli.md, made from the commands themselves.

python tests/cli_page.py          # writes the page
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from doge_deploy.cli.commands import PROGRAM, cli

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"

HEAD = """# Commands

Written by `python tests/cli_page.py` from the help texts; a test fails when this page is stale. `doge-deploy COMMAND
--help` says the same on a terminal. `--debug`, before or after the command's name, adds the traceback of an error.
[Errors](errors.md) has the exit codes.
"""


def commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Every command below a group, in its order; of a group its own commands."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, parent=context, info_name=name)
        if isinstance(command, click.Group):
            yield from commands(command, inner)
        else:
            yield inner.command_path, command, inner


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.replace("|", r"\|").split())


def option(parameter: click.Option, context: click.Context) -> str:
    """A row: the option with its values, and its help."""
    record = parameter.get_help_record(context)
    assert record is not None
    names, text = record
    text = re.sub(r"\.\s+\[", ". [", text)
    return f"| `{cell(names)}` | {cell(text)} |"


def page() -> str:
    """The whole page."""
    context = click.Context(cli, info_name=PROGRAM, max_content_width=10_000, terminal_width=10_000)
    found = [HEAD]
    for path, command, inner in commands(cli, context):
        usage = " ".join([path, *command.collect_usage_pieces(inner)])
        paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        rows = [
            option(parameter, inner)
            for parameter in command.get_params(inner)
            if isinstance(parameter, click.Option) and "--help" not in parameter.opts
        ]
        table = "\n".join(["| Option | |", "| --- | --- |", *rows]) if rows else "No options."
        title = path.removeprefix(f"{PROGRAM} ")
        found.append(
            f"## {title}\n\n<!-- shown: a form, not a command -->\n```text\n{usage}\n```\n\n{text}\n\n{table}\n"
        )
    return "\n".join(found)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
