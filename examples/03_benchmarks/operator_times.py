"""Share of the time per operator type, by ONNX Runtime's profiler: python operator_times.py BUNDLE [--prefill N]

Noting an event takes the profiler longer than a small operator runs. A Reshape moves no data, so the median of those is
what noting takes; it is subtracted from every operator. Of each node the shortest of its runs counts, so that other
processes disturb little. Nodes inside of an If or a Loop count as themselves, not in what holds them.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.ort import open_runner

WARM_UP = 3
CONTAINERS = ("If", "Loop")


def record(
    bundle: Path, *, threads: int, prompt: int, steps: int, portable: bool, batch: int = 1
) -> list[dict[str, Any]]:
    """Events of a prefill of `prompt` tokens, `steps` times, or of `steps` decode steps after 128 where it is 0."""
    opened = open_bundle(bundle)
    ids = np.random.default_rng(0).integers(3, opened.manifest.facts.vocab_size, (batch, prompt or 128))
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        runner = open_runner(opened, threads=threads, portable=portable, flush_denormals=True, profile=profile)
        if prompt:
            for _ in range(steps):
                runner.reset(batch)
                runner.run(ids)
        else:
            runner.reset(batch)
            runner.run(ids)
            for step in range(steps):
                runner.run(ids[:, step % 128][:, None])
        return list(json.loads(Path(runner.session.end_profiling()).read_text()))


def shortest(events: Iterable[dict[str, Any]], skip: int) -> dict[str, list[float]]:
    """Per operator type the shortest run of each of its nodes, in microseconds; the first `skip` runs are left out."""
    ordered = sorted(events, key=lambda event: event["ts"])
    starts = [event["ts"] for event in ordered if event["name"] == "model_run"][skip:]
    runs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in ordered:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= starts[0]:
            runs[event["args"]["op_name"], event["name"]].append(float(event["dur"]))
    found: dict[str, list[float]] = defaultdict(list)
    for (kind, _), times in runs.items():
        if kind not in CONTAINERS:
            # Nodes of a function that is inlined more than once have one name, and are run in the same order each time.
            alike = len(times) // len(starts)
            found[kind] += [min(times[index::alike]) for index in range(alike)]
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", default=1, show_default=True)
@click.option("--prefill", default=0, metavar="N", help="A prefill of N tokens instead of decode steps.")
@click.option("--batch", default=1, show_default=True, help="Rows.")
@click.option("--portable", is_flag=True, help="The standard graph.")
@click.option("--top", default=8, show_default=True, help="Operator types to list; the others are one row.")
def cli(bundle: Path, threads: int, prefill: int, batch: int, portable: bool, top: int) -> None:
    """Print a table of operator types of BUNDLE and their share of the time."""
    steps = 8 if prefill else 200
    events = record(bundle, threads=threads, prompt=prefill, steps=steps, portable=portable, batch=batch)
    skip = WARM_UP if prefill else WARM_UP + 1  # the prefill before the steps
    found = shortest(events, skip)
    noting = median(found["Reshape"])
    times = {kind: sum(max(0.0, time - noting) for time in nodes) for kind, nodes in found.items()}
    total = sum(times.values())
    order = sorted(times, key=lambda kind: -times[kind])
    click.echo("| operator | nodes | us | share |\n| --- | --- | --- | --- |")
    for kind in order[:top]:
        click.echo(f"| {kind} | {len(found[kind])} | {times[kind]:.0f} | {times[kind] / total:.0%} |")
    rest = order[top:]
    nodes, time = sum(len(found[kind]) for kind in rest), sum(times[kind] for kind in rest)
    click.echo(f"| {len(rest)} others | {nodes} | {time:.0f} | {time / total:.0%} |")
    click.echo(f"| all | {sum(map(len, found.values()))} | {total:.0f} | {noting:.1f} us a node subtracted |")


if __name__ == "__main__":
    cli()
