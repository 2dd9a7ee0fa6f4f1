"""Build TensorRT-RTX engines of the published sizes and print the table of docs/build.md.

    python examples/02_published_sizes/engines.py FOLDER [SIZE ...] [--dtype fp16] [--quantize int4] [--verify]

Checkpoints and bundles are made in FOLDER where they are not there yet. No GPU is needed. With `--quantize`, which may
be repeated, engines of weights in few bits are built beside those of the dtype.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import click

from doge_deploy.bundle.engine_record import EngineRecord
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.graph.weight_formats import format_of

SIZES = ("20M", "20M-w512", "20M-MoE", "60M", "160M", "320M")
HEADER = (
    "| Model | Weights in | Weights, MB | Engine, MB | times | of fp16 | Build, s | CPU time, s | Peak memory, MB | "
    "Scratch, MB | KV_CACHE_UPDATE | Attention | of them one kernel | Kernels of few bits |\n|" + " --- |" * 14
)


def doge_deploy(*arguments: str) -> None:
    """Run the command line in a process of its own, as a user would."""
    subprocess.run([sys.executable, "-m", "doge_deploy.cli", *arguments], check=True)


def checkpoint(folder: Path, size: str) -> Path:
    path = folder / f"checkpoint-{size}"
    if not path.exists():
        name, _, window = size.partition("-w")
        script = Path(__file__).with_name("make_random.py")
        options = ["--window", window] if window else []
        subprocess.run([sys.executable, str(script), name, str(path), *options], check=True, stdout=subprocess.DEVNULL)
    return path


def bundle_of(folder: Path, size: str, dtype: str, quantize: str | None) -> Path:
    path = folder / f"{size}-{dtype}{f'-{quantize}' if quantize else ''}"
    if not path.exists():
        few = ["--quantize", quantize] if quantize else []
        doge_deploy("export", str(checkpoint(folder, size)), "-o", str(path), "--dtype", dtype, *few)
    return path


def weights_counted_twice(bundle: Bundle, record: EngineRecord) -> int:
    """Bytes of the weights, a tied embedding twice: once for the lookup, once for the head."""
    facts, stored_as = bundle.manifest.facts, format_of(bundle.manifest.options)
    if not facts.tie_word_embeddings:
        return record.weight_bytes
    shape = (facts.vocab_size, facts.hidden_size)
    if stored_as is not None:
        return record.weight_bytes + stored_as.stored_bytes("model.embed_tokens.weight", shape)
    return record.weight_bytes + shape[0] * shape[1] * (4 if record.dtype == "fp32" else 2)


def cpu_seconds() -> float:
    """Processor time of the processes that were started from here and have ended; other work adds nothing to it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def row(size: str, bundle: Bundle, elapsed: float, seconds: float, plain: int | None) -> str:
    """A row of the table; `plain` are the bytes of the engine in half precision."""
    record = bundle.engine()
    layers, kernels = record.layers, record.kernels
    fused = "unknown" if kernels is None else str(kernels.fused_attention)
    weights = weights_counted_twice(bundle, record)
    cells = [
        size,
        record.dtype if bundle.manifest.options.quantize is None else bundle.manifest.options.quantize,
        f"{record.weight_bytes / 1e6:.1f}",
        f"{record.engine_bytes / 1e6:.1f}",
        f"{record.engine_bytes / weights:.2f}",
        "" if plain is None else f"{record.engine_bytes / plain:.3f}",
        f"{elapsed:.1f}",
        f"{seconds:.1f}",
        f"{record.peak_memory_bytes / 1e6:.0f}",
        "unknown" if record.activation_bytes is None else f"{record.activation_bytes / 1e6:.1f}",
        str(layers.kv_cache_update),
        str(layers.attention),
        fused,
        "" if kernels is None else str(kernels.low_bit),
    ]
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("sizes", nargs=-1, type=click.Choice(SIZES))
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["fp32", "fp16", "bf16"]), default=("fp16", "bf16"))
@click.option(
    "--quantize", "formats", multiple=True, type=click.Choice(["int4", "fp8", "nvfp4"]), help="Of few bits; repeatable."
)
@click.option("--profiles", type=click.Choice(["shared", "separate"]), default="shared", show_default=True)
@click.option("--verify", is_flag=True, help="Compare the lowered graph with transformers, too.")
def main(
    folder: Path, sizes: tuple[str, ...], dtypes: tuple[str, ...], formats: tuple[str, ...], profiles: str, verify: bool
) -> None:
    """Build the engines of SIZES (all where none is named) in FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [HEADER]
    for size in sizes or SIZES:
        plain: dict[str, int] = {}
        for dtype, quantize in ((dtype, quantize) for dtype in dtypes for quantize in (None, *formats)):
            path = bundle_of(folder, size, dtype, quantize)
            start, busy = time.perf_counter(), cpu_seconds()
            doge_deploy("build", str(path), "--target", "trt-rtx", "--profiles", profiles, "--force")
            elapsed, seconds = time.perf_counter() - start, cpu_seconds() - busy
            if verify:
                reference = str(checkpoint(folder, size))
                doge_deploy("verify", str(path), "--lowering", "--reference", reference)
            bundle = open_bundle(path)
            if quantize is None:
                plain[dtype] = bundle.engine().engine_bytes
            rows.append(row(size, bundle, elapsed, seconds, plain[dtype] if quantize else None))
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
