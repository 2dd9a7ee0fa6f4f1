"""Whether a calibrated int4 bundle is the same bytes whatever computes it, and how long its export takes.

    python int4_bytes.py [--dtype fp32|fp16|bf16] [--block-size 32] [--asymmetric] [--no-calibrate] [MODEL ...]

MODEL is doge-tiny and doge-tiny-moe where none is named. Each is exported in a process of its own per row: with one
thread and with two, and with the instructions of older processors, in PyTorch's own code and in its libraries. Prints
the first digits of the sha256 of the weight file, the seconds of the process, and its peak memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "SSE": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL the same everywhere": {"MKL_CBWR": "COMPATIBLE"},
}
"""Variables of the environment by what they stand for."""

EXPORT = """
import json, resource, sys, doge_deploy
doge_deploy.export(sys.argv[1], sys.argv[2], quantize="int4", **json.loads(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@click.command()
@click.argument("models", nargs=-1)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True)
@click.option("--block-size", type=int)
@click.option("--symmetric/--asymmetric", default=True)
@click.option("--calibrate/--no-calibrate", default=True)
def main(models: tuple[str, ...], **options: Any) -> None:
    """Export MODELS in several environments."""
    for model in models or ("doge-tiny", "doge-tiny-moe"):
        hashes = set()
        for name, variables in SETTINGS.items():
            with tempfile.TemporaryDirectory() as folder:
                bundle = Path(folder) / "bundle"
                begin = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", EXPORT, model, str(bundle), json.dumps(options)],
                    env={**os.environ, **variables},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                seconds = time.perf_counter() - begin
                digest = hashlib.sha256((bundle / "weights.safetensors").read_bytes()).hexdigest()
            hashes.add(digest)
            print(f"{model}, {name}: {digest[:12]}, {seconds:.1f} s, {int(done.stdout)} MB", flush=True)
        print(f"{model}: {'the same bytes' if len(hashes) == 1 else f'{len(hashes)} different files'}", flush=True)
        if len(hashes) > 1:
            sys.exit(1)


if __name__ == "__main__":
    main()
