"""Where the memory of a bundle goes: python memory_parts.py BUNDLE [--prompt N]

Resident memory by what it is a mapping of, after each step: libraries, this package, the opened bundle, a prompt of
random tokens, and decode steps. MB are 10**6 bytes. "Anonymous" holds packed weights, caches and what a call computes
with; of the caches only slots that were written are resident. Reference: smaps in proc(5). Linux only.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import click
import numpy as np

KINDS = {
    "weights": r"\.weights$|weights\.safetensors$",
    "ONNX Runtime": r"onnxruntime",
    "NumPy": r"/numpy",
    "Python": r"python",
    "other files": r"^/",
    "heap": r"^\[heap\]$",
    "anonymous": r"",
}
"""What a mapping is of, by its path; the first that fits."""


def resident() -> dict[str, float]:
    """MB by kind, their sum, and the largest sum so far."""
    found: Counter[str] = Counter()
    kind = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)", line):
            kind = next(name for name, pattern in KINDS.items() if re.search(pattern, mapping[1]))
        elif line.startswith("Rss:"):
            found[kind] += int(line.split()[1]) * 1024
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    megabytes = {kind: found[kind] / 1e6 for kind in KINDS}
    return {**megabytes, "sum": sum(megabytes.values()), "peak": int(peak[1]) * 1024 / 1e6}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--prompt", default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--steps", default=40, show_default=True, help="Decode steps after it.")
def cli(bundle: Path, prompt: int, steps: int) -> None:
    """Print a table, a row for each step."""
    rows = {"Python, NumPy, click": resident()}
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    rows["libraries"] = resident()
    from doge_deploy.bundle.files import WEIGHTS_FILE
    from doge_deploy.bundle.opening import open_bundle
    from doge_deploy.runtime.backend import open_backend
    from doge_deploy.runtime.ort import runners  # noqa: F401

    rows["this package"] = resident()
    opened = open_bundle(bundle, check="quick", wait=False)
    runner = open_backend(opened, threads=2, flush_denormals=True)
    rows["opened"] = resident()
    random = np.random.default_rng(0)
    vocabulary = opened.manifest.facts.vocab_size
    runner.reset(1)
    runner.run(random.integers(0, vocabulary, (1, prompt)))
    rows[f"prompt of {prompt}"] = resident()
    for _ in range(steps):
        runner.run(random.integers(0, vocabulary, (1, 1)))
    rows[f"{steps} steps"] = resident()
    caches = sum(array.nbytes for array in getattr(runner, "_buffers", {}).values())
    used = caches * (prompt + steps) / runner.max_length
    weights = opened.manifest.files[WEIGHTS_FILE]["bytes"]
    click.echo(f"{bundle}: weights {weights / 1e6:.1f} MB, caches {caches / 1e6:.1f}, of which used {used / 1e6:.1f}\n")
    columns = list(rows["opened"])
    click.echo(f"| after | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name, row in rows.items():
        click.echo(f"| {name} | {' | '.join(f'{row[column]:.1f}' for column in columns)} |")


if __name__ == "__main__":
    cli()
