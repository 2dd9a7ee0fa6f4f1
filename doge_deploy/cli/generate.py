"""`doge-deploy generate`: text from a bundle, with ONNX Runtime only.

What takes long to import is imported when it is needed: `--help` must not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import click

from doge_deploy.cli.rare_collections import rare_collections
from doge_deploy.cli.runtime_options import runtime_options
from doge_deploy.cli.threads import threads_note
from doge_deploy.errors import UsageError

if TYPE_CHECKING:
    from doge_deploy.runtime.choices import TextChoices
    from doge_deploy.runtime.logprobs import TokenLogprobs
    from doge_deploy.runtime.text_model import Prompt


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue; '-' reads it from standard input.")
@click.option(
    "--chat",
    is_flag=True,
    help="Put the prompt into the chat template. Without --prompt: a conversation, one line of input a turn.",
)
@click.option("--system", metavar="TEXT", help="System message that the chat begins with.")
@click.option("--max-new-tokens", type=int, metavar="N", help="End after this many tokens.")
@click.option("--sample/--greedy", "do_sample", default=None, help="Draw tokens, or take the likeliest.")
@click.option("--temperature", type=float, help="Above 1 makes probabilities more equal. Implies --sample.")
@click.option("--top-k", type=int, metavar="N", help="Draw among the N likeliest, 0: all. Implies --sample.")
@click.option(
    "--top-p",
    type=float,
    help="Draw among the likeliest tokens that together reach this probability. Implies --sample.",
)
@click.option(
    "--min-p",
    type=float,
    help="Draw among tokens with at least this share of the likeliest one's probability. Implies --sample.",
)
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens of prompt and output less likely.")
@click.option("--presence-penalty", type=float, help="-2 to 2: subtracted from the logit of each token of the output.")
@click.option(
    "--frequency-penalty", type=float, help="-2 to 2: the same, for each time that the token is in the output."
)
@click.option("--logit-bias", multiple=True, metavar="ID=NUMBER", help="Added to the logit of token ID; repeatable.")
@click.option("--seed", type=int, metavar="N", help="The same seed draws the same text.")
@click.option("--stop", "stop_strings", multiple=True, metavar="TEXT", help="End before TEXT; repeatable.")
@click.option(
    "--logprobs",
    type=int,
    metavar="N",
    help="After the text, a JSON line for each token: its log probability, and those of the N likeliest.",
)
@click.option("--layout", metavar="static|growing", help="Graph to run. Default: the bundle's first.")
@click.option("--portable", is_flag=True, help="Run the standard graph, not the one lowered for ONNX Runtime.")
@runtime_options
@click.option("--no-graph-cache", is_flag=True, help="Neither read nor write the cache of optimised graphs.")
@click.option("--quiet", is_flag=True, help="No statistics and no notes on standard error.")
def generate(
    bundle: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    layout: str | None,
    portable: bool,
    threads: int | None,
    spin: int | None,
    speculate: bool,
    backend: str,
    engine: str | None,
    no_graph_cache: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Generate text from BUNDLE.

    The text goes to standard output as it is made, statistics go to standard error. What is not given comes
    from the bundle's generation_config.json.
    """
    if prompt is None and not chat:
        raise UsageError("nothing to continue: give --prompt TEXT, --prompt - (standard input) or --chat")
    if system is not None and not chat:
        raise UsageError("--system belongs to a conversation: give --chat too")
    asked = _asked(choices)
    if not quiet and (note := threads_note(threads)):
        click.echo(note, err=True)
    if prompt == "-":
        prompt = _decoded(sys.stdin.buffer.read()).removesuffix("\n")
    runs = {
        "layout": layout,
        "portable": portable,
        "threads": threads,
        "spin": spin,
        "speculate": speculate,
        "backend": backend,
        "engine": engine,
        "graph_cache": not no_graph_cache,
    }
    with rare_collections():
        session = _Session(bundle, asked, runs, quiet)
    messages = [] if system is None else [{"role": "system", "content": system}]
    if prompt is None:
        session.converse(messages)
    elif chat:
        session.answer([*messages, {"role": "user", "content": prompt}])
    else:
        session.answer(prompt)


_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Let NumPy's library of matrix products start no threads where NumPy is imported within, unless the user asked
    for some.

    They would spin for a tenth of a second, on the cores on which files are hashed, the tokenizer is read and the
    session is made; and nothing here multiplies matrices in NumPy.
    """
    if _BLAS_THREADS in os.environ:
        yield
        return
    os.environ[_BLAS_THREADS] = "1"  # read when NumPy is loaded, and not again
    try:
        yield
    finally:
        del os.environ[_BLAS_THREADS]


def _asked(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the command line under their names in generation_config.json, None where not given.

    Raises:
        UsageError: they contradict each other.
    """
    from doge_deploy.runtime.choices import without_effect

    asked = {
        **choices,
        "stop_strings": choices["stop_strings"] or None,
        "logit_bias": dict(map(_bias, choices["logit_bias"])) or None,
    }
    if idle := without_effect(asked):
        options = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in idle.items())
        raise UsageError(f"--greedy draws no token, so {options} would do nothing: drop one or the other")
    return asked


def _bias(text: str) -> tuple[int, float]:
    """`ID=NUMBER` as both."""
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        raise UsageError(
            f"--logit-bias {text}: must be ID=NUMBER, a token's id and what is added to its logit, such as 42=-100"
        ) from None


class _Session:
    """A bundle and what was asked of it, answered on standard output."""

    def __init__(self, path: Path, asked: Mapping[str, Any], backend: Mapping[str, Any], quiet: bool) -> None:
        self._start = perf_counter()
        from doge_deploy.bundle.opening import open_bundle

        opened = open_bundle(path, check="quick", wait=False)  # it is hashed while NumPy and the others are imported
        with _one_blas_thread():
            from doge_deploy.runtime.text_model import TextModel

        self._quiet = quiet
        self._load_ms: float | None = None
        self._loaded = False
        self.model = TextModel(
            opened, **backend, flush_denormals=True, defaults=cast("TextChoices", asked), at_once=True
        )
        for note in self.model.notes:
            self._note(f"note: {note}")

    def converse(self, messages: list[dict[str, str]]) -> None:
        """Answer each line of standard input; `messages` grows by two a turn."""
        self.model.tokenizer.require_chat()
        self.model.open()
        self._note_load()
        for line in _lines():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": self.answer(messages)})

    def answer(self, prompt: Prompt) -> str:
        """Write the text that continues `prompt`: piece by piece, a line end and the statistics after it."""
        stream = self.model.stream(prompt)
        self._note_load()
        for piece in stream:
            _put(piece)
        _put("\n")
        for entry in stream.logprobs:
            click.echo(json.dumps(self._described(entry), ensure_ascii=False), err=True)
        self._note(stream.statistics.line(self._load_ms))
        self._load_ms = None  # of interest once
        return stream.text

    def _described(self, entry: TokenLogprobs) -> dict[str, Any]:
        """A line of `--logprobs`; the text of a token that is a part of a character is U+FFFD."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            # JSON has no infinity: a token that is ruled out has none
            known = logprob if math.isfinite(logprob) else None
            return {"token": token, "text": self.model.tokenizer.text_of([token]), "logprob": known}

        return {**one(entry.token, entry.logprob), "top": [one(*likely) for likely in entry.top]}

    def _note_load(self) -> None:
        """Take the time since the beginning when the model has just been loaded."""
        if not self._loaded:
            self._load_ms = (perf_counter() - self._start) * 1000
            self._loaded = True

    def _note(self, line: str) -> None:
        if not self._quiet:
            click.echo(line, err=True)


def _lines() -> Iterator[str]:
    """Lines of standard input that are not blank, up to its end; on a terminal each after a prompt."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            click.echo("> ", nl=False, err=True)  # standard output holds nothing but text of the model
        line = sys.stdin.buffer.readline()
        if not line:
            break
        if text := _decoded(line).strip():
            yield text
    if terminal:
        click.echo(err=True)


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}"
        ) from None


def _put(text: str) -> None:
    """Write and flush. Where the terminal's encoding lacks a character a question mark stands for it."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
