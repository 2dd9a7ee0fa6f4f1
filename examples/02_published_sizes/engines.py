"""Build TensorRT-RTX engines of the published sizes and print the table of docs/build.md.

    python examples/02_published_sizes/engines.py FOLDER [SIZE ...] [--dtype fp16] [--verify]

Checkpoints and bundles are made in FOLDER where they are not there yet. No GPU is needed.
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

SIZES = ("20M", "20M-w512", "20M-MoE", "60M", "160M", "320M")
HEADER = (
    "| Model | Dtype | Weights, MB | Engine, MB | times | Build, s | CPU time, s | Peak memory, MB | Scratch, MB | "
    "KV_CACHE_UPDATE | Attention | of them one kernel |\n|" + " --- |" * 12
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


def bundle_of(folder: Path, size: str, dtype: str) -> Path:
    path = folder / f"{size}-{dtype}"
    if not path.exists():
        doge_deploy("export", str(checkpoint(folder, size)), "-o", str(path), "--dtype", dtype)
    return path


def weights_counted_twice(bundle: Bundle, record: EngineRecord) -> int:
    """Bytes of the weights, a tied embedding twice: once for the lookup, once for the head."""
    facts = bundle.manifest.facts
    element = 4 if record.dtype == "fp32" else 2
    return record.weight_bytes + facts.tie_word_embeddings * facts.vocab_size * facts.hidden_size * element


def cpu_seconds() -> float:
    """Processor time of the processes that were started from here and have ended; other work adds nothing to it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def row(size: str, bundle: Bundle, elapsed: float, seconds: float) -> str:
    record = bundle.engine(f"trt-rtx-{bundle.manifest.options.dtype}-portable")
    layers, kernels = record.layers, record.kernels
    fused = "unknown" if kernels is None else str(kernels.fused_attention)
    weights = weights_counted_twice(bundle, record)
    cells = [
        size,
        record.dtype,
        f"{record.weight_bytes / 1e6:.1f}",
        f"{record.engine_bytes / 1e6:.1f}",
        f"{record.engine_bytes / weights:.2f}",
        f"{elapsed:.1f}",
        f"{seconds:.1f}",
        f"{record.peak_memory_bytes / 1e6:.0f}",
        "unknown" if record.activation_bytes is None else f"{record.activation_bytes / 1e6:.1f}",
        str(layers.kv_cache_update),
        str(layers.attention),
        fused,
    ]
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("sizes", nargs=-1, type=click.Choice(SIZES))
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["fp32", "fp16", "bf16"]), default=("fp16", "bf16"))
@click.option("--profiles", type=click.Choice(["shared", "separate"]), default="shared", show_default=True)
@click.option("--verify", is_flag=True, help="Compare the lowered graph with transformers, too.")
def main(folder: Path, sizes: tuple[str, ...], dtypes: tuple[str, ...], profiles: str, verify: bool) -> None:
    """Build the engines of SIZES (all where none is named) in FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [HEADER]
    for size in sizes or SIZES:
        for dtype in dtypes:
            path = bundle_of(folder, size, dtype)
            start, busy = time.perf_counter(), cpu_seconds()
            doge_deploy("build", str(path), "--target", "trt-rtx", "--profiles", profiles, "--force")
            elapsed, seconds = time.perf_counter() - start, cpu_seconds() - busy
            if verify:
                reference = str(checkpoint(folder, size))
                doge_deploy("verify", str(path), "--lowering", "--reference", reference)
            rows.append(row(size, open_bundle(path), elapsed, seconds))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
