"""The benchmarks of docs/benchmarks.md: random checkpoints, their bundles, one JSON file per row.

python matrix.py prepare DIR [ROW...]    checkpoints and bundles
python matrix.py run DIR [ROW...]        DIR/results/ROW.json, of rows whose bundles are there
python matrix.py page DIR PAGE           put tables and plots into the page
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import click

import doge_deploy as doge_deploy_package

HERE = Path(__file__).parent
MAKE_RANDOM = HERE.parent / "02_published_sizes" / "make_random.py"

QUANTIZATIONS = {"fp32": (), "int8": ("--quantize", "int8"), "int4": ("--quantize", "int4")}
"""Kind of bundle: options of `export`."""


@dataclass(frozen=True)
class Row:
    """One run of `bench`, and what it needs."""

    checkpoint: tuple[str, ...]
    """Arguments of make_random.py: the size, then options."""
    kinds: tuple[str, ...]
    bench: tuple[str, ...]
    """Options of `bench`."""
    tokenizer: bool = field(default=False)
    """Whether the checkpoint gets a tokenizer, so that `generate` can run."""


_DECODE = ("--against", "transformers,naive", "--roofline")
_PREFILL = ("--prompt-length", "512", "--decode-steps", "8", "--against", "transformers,naive")
_RIVALS = ("--prompt-length", "128,512", "--against", "llama.cpp,openvino,genai,compile", "--roofline", "--rounds", "6")
_EIGHT = ("--batch", "8", "--against", "llama.cpp,openvino", "--roofline", "--loads", "1")
_ALL = tuple(QUANTIZATIONS)

ROWS = {
    "20M": Row(("20M",), _ALL, _DECODE, tokenizer=True),
    "60M": Row(("60M",), _ALL, _DECODE),
    "160M": Row(("160M",), _ALL, (*_DECODE, "--rounds", "6", "--loads", "2")),
    "20M-MoE": Row(("20M-MoE",), _ALL, _DECODE),
    "20M-prefill": Row(("20M",), _ALL, _PREFILL, tokenizer=True),
    "60M-prefill": Row(("60M",), _ALL, _PREFILL),
    "20M-MoE-16384-prefill": Row(("20M-MoE", "--experts", "16384", "64"), ("fp32",), _PREFILL),
    "20M-w512": Row(
        ("20M", "--window", "512", "--length", "8320"),
        ("fp32",),
        ("--past-length", "864,8032", "--rounds", "4", "--loads", "1"),
    ),
    "20M-rivals": Row(("20M",), _ALL, _RIVALS, tokenizer=True),
    "60M-rivals": Row(("60M",), _ALL, _RIVALS),
    "20M-rivals-8": Row(("20M",), _ALL, _EIGHT, tokenizer=True),
    "60M-rivals-8": Row(("60M",), _ALL, _EIGHT),
}
"""20M-w512 decodes over about 1024 and 8192 keys, of which 512 are kept. Rivals need their extras, see docs/bench.md;
those that are not installed are left out.
"""


def checkpoint_of(directory: Path, row: Row) -> Path:
    return directory / "checkpoints" / "-".join(part.strip("-") for part in row.checkpoint)


def bundle_of(directory: Path, row: Row, kind: str) -> Path:
    return directory / "bundles" / checkpoint_of(directory, row).name / kind


def call(*command: str | Path) -> None:
    click.echo(" ".join(map(str, command)), err=True)
    subprocess.run([str(part) for part in command], check=True)


def doge_deploy(*arguments: str | Path) -> tuple[str | Path, ...]:
    return (sys.executable, "-m", "doge_deploy.cli", *arguments)


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of 32768 tokens, trained on Python's standard library, so that `generate` loads one of real size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=32768,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(sorted(map(str, Path(subprocess.__file__).parent.glob("*.py"))), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


@click.group()
def cli() -> None:
    """Benchmarks of docs/benchmarks.md."""


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("rows", nargs=-1, type=click.Choice(list(ROWS)))
def prepare(directory: Path, rows: tuple[str, ...]) -> None:
    """Make what is not there yet."""
    for name in rows or ROWS:
        row = ROWS[name]
        checkpoint = checkpoint_of(directory, row)
        if not checkpoint.is_dir():
            call(sys.executable, MAKE_RANDOM, row.checkpoint[0], checkpoint, *row.checkpoint[1:])
            if row.tokenizer:
                write_tokenizer(checkpoint)
        for kind in row.kinds:
            bundle = bundle_of(directory, row, kind)
            if not bundle.is_dir():
                call(*doge_deploy("export", checkpoint, "-o", bundle, *QUANTIZATIONS[kind]))


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("rows", nargs=-1, type=click.Choice([*ROWS, "generate"]))
def run(directory: Path, rows: tuple[str, ...]) -> None:
    """Time rows; `generate` is whole processes of that command."""
    results = directory / "results"
    results.mkdir(parents=True, exist_ok=True)
    for name in rows or [*ROWS, "generate"]:
        output = results / f"{name}.json"
        if name == "generate":
            output.write_text(json.dumps(time_generate(directory), indent=1) + "\n")
            continue
        row = ROWS[name]
        bundles = [bundle for kind in row.kinds if (bundle := bundle_of(directory, row, kind)).is_dir()]
        reference = checkpoint_of(directory, row)
        call(
            *doge_deploy("bench", *bundles, "--reference", reference, *row.bench, "--threads", "2"),
            *("--cache-dir", directory / "cache", "--json", output),
        )


LIBRARIES = "import numpy, onnxruntime, tokenizers"
LOADED = f"""{LIBRARIES}
import sys
tokenizers.Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
onnxruntime.InferenceSession(sys.argv[1] + "/model.ort.onnx")"""
"""The libraries alone, and the least that they do for one token: read the tokenizer, open the graph."""


def time_generate(directory: Path, runs: int = 20) -> dict[str, dict[str, float | list[float]]]:
    """Wall time of `generate` of one token, from starting the process to its end, after one run that is not counted.

    In turns with it: a process that imports the libraries, and one in which they also load what is needed.
    `over_imports` and `over_loaded` are the ratio of the medians to these, then the quartiles of single turns' ratios.
    """
    bundles = {kind: bundle_of(directory, ROWS["20M"], kind) for kind in QUANTIZATIONS}
    script = Path(sys.executable).with_name("doge-deploy")
    # a checkout's modules have byte code, as installed ones do, also where the environment says not to write it
    call(sys.executable, "-m", "compileall", "-q", Path(doge_deploy_package.__file__).parent)
    times: dict[str, dict[str, float | list[float]]] = {}
    for kind, bundle in bundles.items():
        if not bundle.is_dir():
            continue
        command = [script, "generate", bundle, "--prompt", "import", "--max-new-tokens", "1", "--quiet"]
        turns = [
            (
                wall_time(*command, "--threads", "2"),
                wall_time(sys.executable, "-c", LIBRARIES),
                wall_time(sys.executable, "-c", LOADED, bundle),
            )
            for _ in range(runs + 1)
        ][1:]
        own = [turn[0] for turn in turns]
        times[kind] = {
            "median_s": median(own),
            "p90_s": quantiles(own, n=10)[8],
            "over_imports": ratio_of_turns(turns, 1),
            "over_loaded": ratio_of_turns(turns, 2),
            "n": len(turns),
        }
        click.echo(f"generate, 20M {kind}: {times[kind]}", err=True)
    return times


def ratio_of_turns(turns: list[tuple[float, ...]], other: int) -> list[float]:
    """The first time over another one: the ratio of the medians, and the quartiles of the ratios of single turns."""
    single = quantiles([turn[0] / turn[other] for turn in turns], n=4)
    return [median(turn[0] for turn in turns) / median(turn[other] for turn in turns), single[0], single[2]]


def wall_time(*command: str | Path) -> float:
    """Seconds from starting the process to its end."""
    start = perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - start


@cli.command("page")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("page", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def page_command(directory: Path, page: Path) -> None:
    """Put what the JSON files in DIRECTORY/results say into PAGE, and plots beside it."""
    from page import write_page

    results = directory / "results"
    if not any(file.stem in ROWS for file in results.glob("*.json")):
        raise click.UsageError(f"{results} has no results of a row; make some by: matrix.py run {directory}")
    write_page(results, page)


if __name__ == "__main__":
    cli()
