"""`doge-deploy generate`: text from a bundle, with ONNX Runtime only.

What takes long to import is imported when it is needed: `--help` must not wait for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from doge_deploy.errors import UsageError
from doge_deploy.options.backends import BACKENDS, Backend

if TYPE_CHECKING:
    from doge_deploy.runtime.generate import TextGenerator, TextStream

EXIT_INTERRUPTED = 128 + 2
"""What a shell reports of a command that SIGINT ended."""
EXIT_BROKEN_PIPE = 128 + 13
"""The same of SIGPIPE."""


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue; '-' reads it from standard input.")
@click.option(
    "--chat",
    is_flag=True,
    help="Put the prompt into the chat template. Without --prompt: a conversation, one line of input a turn.",
)
@click.option("--system", metavar="TEXT", help="System message that the chat begins with.")
@click.option("--max-new-tokens", type=int, metavar="N", help="End after so many tokens.")
@click.option("--sample/--greedy", "do_sample", default=None, help="Draw tokens, or take the likeliest.")
@click.option("--temperature", type=float, help="Above 1 evens out the odds. Implies --sample.")
@click.option("--top-k", type=int, metavar="N", help="Draw among the N likeliest, 0: all. Implies --sample.")
@click.option("--top-p", type=float, help="Draw among the likeliest that reach it. Implies --sample.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens that were there less likely.")
@click.option("--seed", type=int, metavar="N", help="The same seed draws the same text.")
@click.option("--stop", "stop_strings", multiple=True, metavar="TEXT", help="End before TEXT; repeatable.")
@click.option("--layout", metavar="static|growing", help="Graph to run; default: the bundle's first.")
@click.option("--portable", is_flag=True, help="Run the standard graph, not the one lowered for ONNX Runtime.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads; default: all cores.")
@click.option("--backend", type=click.Choice(BACKENDS), default="ort", show_default=True, help="What runs the bundle.")
@click.option("--engine", metavar="NAME", help="Which engine, where the backend has several.")
@click.option("--quiet", is_flag=True, help="No statistics and no notes on standard error.")
def generate(
    bundle: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    layout: str | None,
    portable: bool,
    threads: int | None,
    backend: Backend,
    engine: str | None,
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
    with _quiet_ends():
        if prompt == "-":
            prompt = _decoded(sys.stdin.buffer.read()).removesuffix("\n")
        model = {"layout": layout, "portable": portable, "threads": threads, "backend": backend, "engine": engine}
        session = _Session(bundle, asked, model, quiet)
        messages = [] if system is None else [{"role": "system", "content": system}]
        if prompt is None:
            session.converse(messages)
        elif chat:
            messages.append({"role": "user", "content": prompt})
            session.answer(session.tokenizer.render_chat(messages))
        else:
            session.answer(session.tokenizer.encode(prompt))


def _asked(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the command line under their names in generation_config.json, None where not given.

    Raises:
        UsageError: they contradict each other.
    """
    asked = {**choices, "stop_strings": choices["stop_strings"] or None}
    drawing = [name for name in ("temperature", "top_k", "top_p") if asked[name] is not None]
    if drawing and asked["do_sample"] is False:
        options = ", ".join(f"--{name.replace('_', '-')} {asked[name]}" for name in drawing)
        raise UsageError(f"--greedy draws no token, so {options} would do nothing: drop one or the other")
    if drawing:
        asked["do_sample"] = True
    return asked


class _Session:
    """A bundle and what was asked of it; the model is loaded last, when the rest has shown no errors."""

    def __init__(
        self,
        path: Path,
        asked: Mapping[str, Any],
        model: Mapping[str, Any],
        quiet: bool,
    ) -> None:
        self._start = perf_counter()
        from doge_deploy.bundle.manifest import open_bundle
        from doge_deploy.options.generation import GENERATION_CONFIG, GenerationOptions, settings_not_done
        from doge_deploy.runtime.tokenizer import Tokenizer

        self._model, self._quiet = model, quiet
        self._load_ms: float | None = None
        self.bundle = open_bundle(path, check="quick")
        if (task := self.bundle.manifest.task) != "causal-lm":
            raise UsageError(f"{path} is a bundle for task={task}; text is generated by one for causal-lm only")
        facts = self.bundle.manifest.facts
        self.tokenizer = Tokenizer.from_directory(self.bundle.path, vocab_size=facts.vocab_size)
        config = self.bundle.read_json(GENERATION_CONFIG)
        file = self.bundle.path / GENERATION_CONFIG
        self.options = GenerationOptions.with_file(config, asked, eos_ids=facts.eos_token_ids, source=file)
        if ignored := settings_not_done(config):
            self._note(f"note: generation_config.json asks for {', '.join(ignored)}, which is not done here")

    def answer(self, prompt_ids: list[int]) -> None:
        """Write the text that continues `prompt_ids`."""
        from doge_deploy.runtime.generate import check_prompt

        check_prompt(prompt_ids, self.bundle.manifest.max_length)
        self._write(self._load().stream(prompt_ids))

    def converse(self, messages: list[dict[str, str]]) -> None:
        """Answer each line of standard input; `messages` grows by two a turn."""
        self.tokenizer.require_chat()
        generator = self._load()
        for line in _lines():
            messages.append({"role": "user", "content": line})
            reply = self._write(generator.stream(self.tokenizer.render_chat(messages)))
            messages.append({"role": "assistant", "content": reply})

    def _load(self) -> TextGenerator:
        from doge_deploy.runtime.backend import open_backend
        from doge_deploy.runtime.generate import TextGenerator

        runner = open_backend(self.bundle, **self._model, flush_denormals=True)
        self._load_ms = (perf_counter() - self._start) * 1000
        return TextGenerator(runner, self.tokenizer, self.options)

    def _write(self, stream: TextStream) -> str:
        """The text goes out piece by piece, a line end and the statistics after it."""
        for piece in stream:
            _put(piece)
        _put("\n")
        self._note(stream.statistics.line(self._load_ms))
        self._load_ms = None  # of interest once
        return stream.text

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


@contextlib.contextmanager
def _quiet_ends() -> Iterator[None]:
    """Ctrl-C and a reader that went away end the command as they end other commands: without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(err=True)  # the shell's prompt begins on a line of its own
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # Python flushes standard output once more when it ends; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_BROKEN_PIPE) from None
