"""`doge-deploy`: finds the command, and turns every error into one line and an exit code.

Exit codes: 0 good; 1 mismatch; 2 usage; 3 unsupported or broken model or bundle; 4 missing dependency or device;
130 interrupted; 143 terminated.
"""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from doge_deploy import __version__
from doge_deploy.errors import DogeDeployError

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

_COMMANDS = {
    "doctor": "Say what this machine, or another device, can do.",
    "export": "Trace a checkpoint to an ONNX bundle.",
    "build": "Build a TensorRT engine of a bundle.",
    "verify": "Prove by numbers that a bundle computes what transformers computes.",
    "generate": "Generate text from a bundle.",
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
@click.version_option(__version__, prog_name="doge-deploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Deployment compiler for Doge language models.

    Exit codes: 0 good, 1 mismatch, 2 usage, 3 unsupported or broken model, 4 missing dependency or device.
    """
    ctx.obj = {"debug": debug}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command and exits."""
    # A polite request to stop unwinds like an error, so that nothing half-written is left behind.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_TERMINATED))
    args = list(sys.argv[1:] if arguments is None else arguments)
    # Taken off here so that it works before and after the command's name.
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        sys.exit(run_command(args, debug))
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: it was not set from Python


def run_command(args: list[str], debug: bool = False) -> int:
    """Run `doge-deploy ARGS`, errors to standard error as one line; the exit code."""
    try:
        result: Any = cli.main(args=args, prog_name="doge-deploy", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        click.echo("doge-deploy: interrupted", err=True)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code, debug, hint=_help_hint(error))
    except DogeDeployError as error:
        return _fail(str(error), error.exit_code, debug)


def _fail(message: str, exit_code: int, debug: bool, hint: str = "") -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"doge-deploy: error: {message}{hint}", err=True)
    return exit_code


def _help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see '{context.command_path} --help')" if context is not None else ""
