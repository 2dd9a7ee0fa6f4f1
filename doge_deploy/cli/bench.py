"""`doge-deploy bench`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from doge_deploy.cli.backend_name import BackendName
from doge_deploy.cli.threads import threads_note
from doge_deploy.options.backends import DEFAULT_BACKEND


def _numbers(minimum: int) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[int, ...]]:
    """A repeatable option of whole numbers, which may also be given as `1,2,3`."""

    def parse(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
        numbers = []
        for text in _parts(values):
            try:
                number = int(text)
            except ValueError:
                number = minimum - 1
            if number < minimum:
                raise click.BadParameter(f"{text!r} is not a whole number from {minimum} up", context, parameter)
            numbers.append(number)
        return tuple(dict.fromkeys(numbers))

    return parse


def _baselines(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    from doge_deploy.bench.baselines.catalog import BASELINES

    legal = tuple(BASELINES)
    for name in _parts(values):
        if name not in legal:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(legal)}", context, parameter)
    return tuple(dict.fromkeys(_parts(values)))


def _parts(values: tuple[str, ...]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",")]


@click.command("bench")
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--prompt-length",
    "prompt_lengths",
    multiple=True,
    default=("128",),
    callback=_numbers(1),
    metavar="N,...",
    help="Tokens fed in one call.  [default: 128]",
)
@click.option(
    "--past-length",
    "past_lengths",
    multiple=True,
    default=("0",),
    callback=_numbers(0),
    metavar="N,...",
    help="Tokens in the cache before the prompt.  [default: 0]",
)
@click.option(
    "--batch",
    "batch_sizes",
    multiple=True,
    default=("1",),
    callback=_numbers(1),
    metavar="N,...",
    help="Rows.  [default: 1]",
)
@click.option(
    "--decode-steps",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="N",
    help="Timed decode steps per round.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Rounds, in each of which every candidate has its turn.",
)
@click.option(
    "--loads",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Fresh processes per candidate, for load time and memory.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads of every candidate. Default: one per core."
)
@click.option(
    "--spin",
    "spins",
    multiple=True,
    callback=_numbers(0),
    metavar="US,...",
    help="Microseconds that idle threads of a bundle wait actively before they sleep; each number is a candidate.",
)
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    metavar="static|growing",
    help="Layout to time; repeatable. Default: the bundle's first.",
)
@click.option("--portable", is_flag=True, help="Also time the standard graph, beside the one lowered for ONNX Runtime.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=BackendName(),
    default=(DEFAULT_BACKEND,),
    help=f"What runs each bundle; repeatable, each is a candidate.  [default: {DEFAULT_BACKEND}]",
)
@click.option(
    "--against",
    multiple=True,
    callback=_baselines,
    metavar="NAME,...",
    help="What takes turns with the bundle: transformers, naive, compile, genai, openvino, llama.cpp.",
)
@click.option(
    "--reference", metavar="MODEL", help="The checkpoint of baselines. Default: the one that the bundle names."
)
@click.option("--roofline", is_flag=True, help="Measure bandwidth and matrix products, and which share decode reaches.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write every time here.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the result.")
@click.option(
    "--cache-dir", "cache", type=click.Path(path_type=Path), metavar="DIR", help="Where what baselines need is kept."
)
def bench(bundles: tuple[Path, ...], json_file: Path | None, plot_file: Path | None, **choices: Any) -> None:
    """Time BUNDLE: first token, prefill, decode, memory, load.

    Of several bundles the first is what the others are compared with. Every candidate lives in a process of its own;
    timed sections take turns.
    """
    from doge_deploy.bench.files import check_writable, write_json

    for file in (json_file, plot_file):
        if file is not None:
            check_writable(file)
    if plot_file is not None:
        from doge_deploy.bench.plot import require_matplotlib

        require_matplotlib()
    from doge_deploy.bench.run import BenchOptions
    from doge_deploy.bench.run import bench as run
    from doge_deploy.cli.bench_table import BenchTables

    if note := threads_note(choices["threads"]):
        click.echo(note, err=True)
    with BenchTables() as tables:
        options = BenchOptions(**choices)
        report = run(bundles, options, argv=sys.argv[1:], started=tables.started, finished=tables.finished)
    if json_file is not None:
        write_json(report, json_file)
    if plot_file is not None:
        from doge_deploy.bench.plot import plot

        plot(report, plot_file)
