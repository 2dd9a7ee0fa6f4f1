"""The commands by name, each loaded when it is called; `run` is click's part of the command line."""

from __future__ import annotations

import importlib
import os
from typing import Any

import click

from doge_deploy import __version__

PROGRAM = "doge-deploy"

_COMPLETION = "_DOGE_DEPLOY_COMPLETE"
"""The variable by which a shell asks click to complete a command line."""

_COMMANDS = {
    "doctor": "Say what this machine, or another device, can do.",
    "export": "Trace a checkpoint to an ONNX bundle.",
    "build": "Build a TensorRT engine of a bundle.",
    "pack": "Write a bundle with its engines into one compressed file.",
    "unpack": "Make a bundle of such a file, and check every byte.",
    "verify": "Prove by numbers that a bundle computes what transformers computes.",
    "record": "Record the reference's answers, to verify on machines without it.",
    "bisect": "Name the weight, pass or package by which two bundles of one checkpoint differ.",
    "generate": "Generate text from a bundle.",
    "serve": "Serve bundles over HTTP, with the interface of OpenAI's API.",
    "bench": "Time a bundle, beside transformers and a plain export.",
    "inspect": "Show what a bundle is, and check its files.",
    "plugins": "List, check, compile and cost the kernels of Doge's two operators.",
}
"""In the order of use; each lives in a file of its own name here. The help texts spare `--help` their imports."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"doge_deploy.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Deployment compiler for Doge language models.

    Exit codes: 0 good, 1 mismatch, 2 usage, 3 unsupported or broken model, 4 missing dependency, device or memory.
    """


def run(args: list[str]) -> int:
    """Run `doge-deploy ARGS`; the exit code of a command that ended well.

    Not `cli.main`, which ends with 1 itself where the reader of the output goes away and takes the end of any input
    for an interrupt.

    Raises:
        click.ClickException, DogeDeployError, or whatever else ended the command.
    """
    if instruction := os.environ.get(_COMPLETION):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, PROGRAM, _COMPLETION, instruction)
    try:
        with cli.make_context(PROGRAM, list(args)) as context:
            result: Any = cli.invoke(context)
    except click.exceptions.Exit as end:  # of --help and --version
        return end.exit_code
    return result if isinstance(result, int) else 0
