"""Engines of the 20M size whose cache holds the window, for texts of any length: a table for docs/build.md.

    python examples/02_published_sizes/bounded.py FOLDER [LENGTH ...] [--window 2048] [--dtype fp16]

Checkpoints (default RoPE, whose angles never change) and bundles are made in FOLDER where they are not there yet. No
GPU is needed. It fails where scratch memory or cache are not the same for all lengths.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from make_random import make_config, make_model

from doge_deploy.bundle.engine_record import EngineRecord
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.options.build import BuildOptions
from doge_deploy.options.export import ExportOptions
from doge_deploy.pipelines.build import build
from doge_deploy.pipelines.export import export
from doge_deploy.process.progress import Progress
from doge_deploy.runtime.trt.plan import make_plan

LENGTHS = (4096, 32768, 131072)
HEADER = (
    "| Length | Weights, MB | of them angles, MB | Decode, MB | Prefill, MB | Build, s | Peak memory, MB | "
    "Scratch of decode, MB | of prefill, MB | Cache, MB |\n|" + " --- |" * 10
)


class Quiet(Progress):
    """Tells nobody."""

    def stage(self, name: str, total: int = 1):  # type: ignore[no-untyped-def]
        return lambda done: None


def checkpoint(folder: Path, window: int, length: int) -> Path:
    """A 20M of random weights that was made for texts of `length` tokens."""
    path = folder / f"checkpoint-20M-w{window}-{length}"
    if not path.exists():
        rope = {"rope_type": "default", "rope_theta": 1e6}
        config = make_config("20M", keep_window_size=window, max_position_embeddings=length, rope_parameters=rope)
        make_model(config, 0).save_pretrained(path)
    return path


def bundle_of(folder: Path, window: int, length: int, dtype: str) -> Bundle:
    path = folder / f"20M-w{window}-{length}-{dtype}"
    if not path.exists():
        options = ExportOptions.model_validate({"dtype": dtype, "max_length": length})
        export(str(checkpoint(folder, window, length)), path, options, force=False, progress=Quiet())
    return open_bundle(path)


def row(bundle: Bundle, record: EngineRecord) -> str:
    prefill = record.prefill
    assert prefill is not None
    angles = 2 * bundle.manifest.max_length * bundle.manifest.facts.head_dim // 2 * 2
    cache = make_plan(record, bundle.layout("static").signature).cache_bytes(1)
    cells = [
        f"{bundle.manifest.max_length}",
        f"{record.weight_bytes / 1e6:.1f}",
        f"{angles / 1e6:.1f}",
        f"{record.engine_bytes / 1e6:.1f}",
        f"{prefill.engine_bytes / 1e6:.1f}",
        f"{record.build_seconds:.1f} + {prefill.build_seconds:.1f}",
        f"{max(record.peak_memory_bytes, prefill.peak_memory_bytes) / 1e6:.0f}",
        f"{(record.activation_bytes or 0) / 1e6:.3f}",
        f"{(prefill.activation_bytes or 0) / 1e6:.3f}",
        f"{cache / 1e6:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("lengths", nargs=-1, type=int)
@click.option("--window", type=int, default=2048, show_default=True)
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True)
def main(folder: Path, lengths: tuple[int, ...], window: int, dtype: str) -> None:
    """Build the engines for texts of LENGTHS tokens in FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, sizes = [HEADER], set()
    for length in lengths or LENGTHS:
        bundle = bundle_of(folder, window, length, dtype)
        record = build(bundle.path, BuildOptions.model_validate({}), force=True, progress=Quiet())
        rows.append(row(bundle, record))
        assert record.prefill is not None
        cache = make_plan(record, bundle.layout("static").signature).cache_bytes(1)
        sizes.add((record.activation_bytes, record.prefill.activation_bytes, cache))
    print("\n".join(rows))
    if len(sizes) > 1:
        sys.exit(f"scratch and cache differ: {sorted(map(str, sizes))}")


if __name__ == "__main__":
    main()
