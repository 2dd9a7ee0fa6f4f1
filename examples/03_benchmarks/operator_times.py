"""Share of the time per operator type: python operator_times.py BUNDLE [--prefill N] or [--in-step]

By ONNX Runtime's profiler, or with --in-step without it:

Noting an event takes the profiler longer than a small operator runs. A Reshape moves no data, so the median of those is
what noting takes; it is subtracted from every operator. Of each node the shortest of its runs counts, so that other
processes disturb little. Nodes inside of an If or a Loop count as themselves, not in what holds them.

The profiler does not see what lies between operators, nor how they disturb each other. `--in-step` says how much longer
a step takes when the graph has every node of a type twice, the second ones at its end, whose outputs nobody reads: so a
node counts with all that comes with it. What is left is attention, the writing of caches and the start of a call; those
cannot be done twice, since they write in place.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnx

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.runtime.ort import graph_file, open_runner
from doge_deploy.runtime.ort.runners import StaticOrtRunner
from doge_deploy.runtime.ort.session import open_session

WARM_UP = 3
CONTAINERS = ("If", "Loop")
IN_PLACE = ("GroupQueryAttention", "TensorScatter")
"""Operators that write a cache."""

PRODUCTS = {"MatMul", "FusedMatMul", "MatMulNBits"}

STEPS = 60


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


class Clocked:
    """A session that notes how long its calls take; everything else is the session's."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        begin = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.seconds.append(time.perf_counter() - begin)


class Steps:
    """Decode steps of a graph that ONNX Runtime optimised, after a prompt of 128 tokens in each row, or of half of
    what the bundle holds.
    """

    def __init__(self, bundle: Bundle, graph: Path, threads: int, batch: int) -> None:
        session = open_session(graph, graph.parent, threads=threads, flush_denormals=True, optimised=True)
        manifest = bundle.manifest
        self._clock = Clocked(session)
        tokens = min(128, manifest.max_length // 2)
        self._ids = np.tile(np.arange(3, 3 + tokens)[None], (batch, 1))
        self._steps = min(STEPS, tokens - WARM_UP)
        keywords = {"max_length": manifest.max_length, "last": manifest.last_logits, "whole_calls": False}
        self._runner = StaticOrtRunner(self._clock, bundle.layout(), **keywords)

    def microseconds(self) -> tuple[float, float]:
        """A step, and the call of ONNX Runtime in it: medians."""
        ids = self._ids
        self._runner.reset(len(ids))
        self._runner.run(ids)
        for _ in range(WARM_UP):
            self._runner.run(ids[:, :1])
        self._clock.seconds.clear()
        taken = []
        for _ in range(self._steps):
            begin = time.perf_counter()
            self._runner.run(ids[:, :1])
            taken.append(time.perf_counter() - begin)
        return median(taken) * 1e6, median(self._clock.seconds) * 1e6


def doubled(graph: onnx.ModelProto, kinds: Collection[str]) -> onnx.ModelProto:
    """The graph with every node of some types once more, at its end."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    for number, node in enumerate(graph.graph.node):
        if node.op_type in kinds:
            again = model.graph.node.add()
            again.CopyFrom(node)
            again.name = f"again.{number}"
            again.output[:] = [f"again.{name}" if name else "" for name in node.output]
    return model


def print_step(bundle: Bundle, threads: int, batch: int, rounds: int) -> None:
    """A table of what a decode step is made of; types with fewer nodes than layers are one row."""
    if type(open_runner(bundle, "static", threads=threads)) is not StaticOrtRunner:
        raise click.UsageError("--in-step times a static bundle that holds all keys")
    with tempfile.TemporaryDirectory() as folder:
        optimised, changed = Path(folder) / "graph.onnx", Path(folder) / "changed.onnx"
        source = bundle.path / graph_file(bundle.layout("static"))
        open_session(source, bundle.path, threads=threads, flush_denormals=True, save_to=optimised)
        graph = onnx.load(optimised, load_external_data=False)
        counts = Counter(node.op_type for node in graph.graph.node)
        plain = Steps(bundle, optimised, threads, batch)
        single = set(counts) - {*IN_PLACE, *CONTAINERS}
        often = {kind for kind in single if counts[kind] >= counts["GroupQueryAttention"]}
        longer, steps, calls = {}, [], []
        for kinds in (*([kind] for kind in sorted(often)), sorted(single - often)):
            onnx.save(doubled(graph, kinds), changed)
            other, differences = Steps(bundle, changed, threads, batch), []
            for _ in range(rounds):
                step, call = plain.microseconds()
                steps.append(step)
                calls.append(call)
                differences.append(other.microseconds()[1] - call)
            longer[tuple(kinds)] = median(differences)
    step, call = median(steps), median(calls)
    click.echo("| operator | nodes | us a step | us a node |\n| --- | --- | --- | --- |")
    for kinds in sorted(longer, key=lambda kinds: -longer[kinds]):
        name, nodes = ", ".join(kinds), sum(counts[kind] for kind in kinds)
        click.echo(f"| {name} | {nodes} | {longer[kinds]:.1f} | {longer[kinds] / nodes:.2f} |")
    rest = ", ".join(kind for kind in (*IN_PLACE, *CONTAINERS) if counts[kind])
    nodes = sum(counts[kind] for kind in (*IN_PLACE, *CONTAINERS))
    click.echo(f"| the rest: {rest}, start of a call | {nodes} | {call - sum(longer.values()):.1f} | |")
    click.echo(f"| Python, and reading the logits | 0 | {step - call:.1f} | |")
    click.echo(f"| all | {sum(counts.values())} | {step:.1f} | |")
    small = [kinds for kinds in longer if not {*kinds} & PRODUCTS]
    nodes, taken = sum(counts[kind] for kinds in small for kind in kinds), sum(longer[kinds] for kinds in small)
    click.echo(f"\nwithout products: {nodes} nodes, {taken:.1f} us, {taken / nodes:.2f} each")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", default=1, show_default=True)
@click.option("--prefill", default=0, metavar="N", help="A prefill of N tokens instead of decode steps.")
@click.option("--batch", default=1, show_default=True, help="Rows.")
@click.option("--portable", is_flag=True, help="The standard graph.")
@click.option("--in-step", is_flag=True, help="What a decode step is made of, without the profiler.")
@click.option("--rounds", default=11, show_default=True, help="With --in-step.")
@click.option("--top", default=8, show_default=True, help="Operator types to list; the others are one row.")
def cli(
    bundle: Path, threads: int, prefill: int, batch: int, portable: bool, in_step: bool, rounds: int, top: int
) -> None:
    """Print a table of operator types of BUNDLE and their share of the time."""
    if in_step:
        if prefill or portable:
            raise click.UsageError("--in-step times decode steps of the lowered graph")
        print_step(open_bundle(bundle), threads, batch, rounds)
        return
    steps = 8 if prefill else 200
    events = record(bundle, threads=threads, prompt=prefill, steps=steps, portable=portable, batch=batch)
    skip = WARM_UP if prefill else WARM_UP + 1  # the prefill before the steps
    found = shortest(events, skip)
    noting = median(found["Reshape"])
    times = {kind: sum(max(0.0, taken - noting) for taken in nodes) for kind, nodes in found.items()}
    total = sum(times.values())
    order = sorted(times, key=lambda kind: -times[kind])
    click.echo("| operator | nodes | us | share |\n| --- | --- | --- | --- |")
    for kind in order[:top]:
        click.echo(f"| {kind} | {len(found[kind])} | {times[kind]:.0f} | {times[kind] / total:.0%} |")
    rest = order[top:]
    nodes, others = sum(len(found[kind]) for kind in rest), sum(times[kind] for kind in rest)
    click.echo(f"| {len(rest)} others | {nodes} | {others:.0f} | {others / total:.0%} |")
    click.echo(f"| all | {sum(map(len, found.values()))} | {total:.0f} | {noting:.1f} us a node subtracted |")


if __name__ == "__main__":
    cli()
