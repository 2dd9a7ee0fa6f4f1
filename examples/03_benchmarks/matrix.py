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
from statistics import quantiles
from time import perf_counter

import click

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


def time_generate(directory: Path, runs: int = 20) -> dict[str, dict[str, float]]:
    """Wall time of `generate` of one token, from starting the process to its end, after one run that is not counted."""
    times: dict[str, dict[str, float]] = {}
    bundles = {kind: bundle_of(directory, ROWS["20M"], kind) for kind in QUANTIZATIONS}
    samples: dict[str, list[float]] = {kind: [] for kind, bundle in bundles.items() if bundle.is_dir()}
    script = Path(sys.executable).with_name("doge-deploy")
    for number in range(runs + 1):
        for kind in samples:
            command = [script, "generate", bundles[kind], "--prompt", "import", "--max-new-tokens", "1", "--quiet"]
            start = perf_counter()
            subprocess.run([*map(str, command), "--threads", "2"], check=True, stdout=subprocess.DEVNULL)
            if number:
                samples[kind].append(perf_counter() - start)
    for kind, seconds in samples.items():
        deciles = quantiles(seconds, n=10)
        times[kind] = {"median_s": quantiles(seconds, n=2)[0], "p90_s": deciles[8], "n": len(seconds)}
        click.echo(f"generate, 20M {kind}: {times[kind]}", err=True)
    return times


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
