"""Every error as one line and an exit code; the table of docs/errors.md.

The code says who can mend it. 1 is left to one class alone, `MismatchError`: whoever reads it may be sure that numbers
were compared.
"""

from __future__ import annotations

import contextlib
import errno
import traceback

import click

from doge_deploy.cli.streams import discard_output
from doge_deploy.diagnostics import out_of_memory, shortened
from doge_deploy.errors import DogeDeployError

EXIT_USAGE = 2
EXIT_UNSUPPORTED = 3
EXIT_MISSING = 4
EXIT_INTERNAL = 70
"""sysexits(3) calls it EX_SOFTWARE."""
EXIT_INTERRUPTED = 128 + 2
"""What a shell reports of a command that SIGINT ended."""
EXIT_BROKEN_PIPE = 128 + 13
"""The same of SIGPIPE."""

_MACHINE = frozenset(
    getattr(errno, name)
    for name in """
    EIO ENOMEM EMFILE ENFILE EAGAIN ENODEV ENXIO ETIMEDOUT ECONNREFUSED ECONNRESET ECONNABORTED EHOSTUNREACH
    ENETUNREACH ENETDOWN ESTALE ENOSYS
    """.split()
    if hasattr(errno, name)
)
"""Errors of a file or connection that no other path would mend; all others are about the path or its disk."""


def end(error: BaseException, *, debug: bool = False) -> int:
    """Say in one line on standard error what ended a command; its exit code. `debug` puts the traceback before it."""
    code, message = ending(error)
    with contextlib.suppress(OSError, ValueError):  # standard error may be what is broken
        if debug and code not in (EXIT_INTERRUPTED, EXIT_BROKEN_PIPE):
            traceback.print_exception(error)
        if message:
            click.echo(message, err=True)
    if code == EXIT_BROKEN_PIPE or isinstance(error, OSError):
        discard_output()
    return code


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and its line, which is empty where there is nothing to say."""
    if isinstance(error, SystemExit):
        return _exit(error)
    if isinstance(error, (KeyboardInterrupt, click.exceptions.Abort)):
        return EXIT_INTERRUPTED, "\ndoge-deploy: interrupted"  # a terminal shows ^C at the beginning of the line
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE, ""
    code, text = _failure(error)
    return code, f"doge-deploy: error: {' '.join(text.split())}"


def _exit(error: SystemExit) -> tuple[int, str]:
    """A request to end; 1 and words are what Python programs exit with that fail, which is none of ours."""
    if isinstance(error.__context__, BrokenPipeError):  # rich makes an exit of it
        return EXIT_BROKEN_PIPE, ""
    if error.code is None or (isinstance(error.code, int) and error.code != 1):
        return error.code or 0, ""
    return EXIT_INTERNAL, f"doge-deploy: error: a library ended the command: {' '.join(str(error.code).split())}"


def _failure(error: BaseException) -> tuple[int, str]:
    if isinstance(error, click.ClickException):
        # click's own errors are of usage; those of files have code 1
        return EXIT_USAGE, f"{error.format_message()}{_help_hint(error)}"
    if isinstance(error, DogeDeployError):
        return error.exit_code, str(error)
    if out_of_memory(error):
        return EXIT_MISSING, f"out of memory: {_words(error) or 'the system gave no more'}"
    if isinstance(error, RecursionError):
        return EXIT_UNSUPPORTED, f"nested too deeply: {_words(error)}"
    if isinstance(error, ImportError):
        return EXIT_MISSING, f"{_words(error)}; is the installation complete? (--debug shows where)"
    if isinstance(error, OSError):
        return _system(error)
    if _foreign(error):
        return EXIT_UNSUPPORTED, f"{type(error).__name__}: {_words(error)} (--debug shows where)"
    return EXIT_INTERNAL, f"unexpected {type(error).__name__}: {_words(error)} (--debug shows where; please report it)"


def _system(error: OSError) -> tuple[int, str]:
    """What the system refused, and of which file."""
    if error.errno is None:  # a library's own words
        return EXIT_UNSUPPORTED, f"{type(error).__name__}: {_words(error)} (--debug shows where)"
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error)
    code = EXIT_MISSING if error.errno in _MACHINE else EXIT_USAGE
    return code, shortened(f"{files}: {reason}" if files else f"{reason} (--debug shows where)")


def _foreign(error: BaseException) -> bool:
    """A library's error: of a class of its own, or the RuntimeError that C++ libraries turn everything into."""
    package = type(error).__module__.split(".")[0]
    return type(error) in (RuntimeError, Exception) or package not in ("builtins", "doge_deploy", "click")


def _words(error: BaseException) -> str:
    return shortened(" ".join(str(error).split()))


def _help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see '{context.command_path} --help')" if context is not None else ""
