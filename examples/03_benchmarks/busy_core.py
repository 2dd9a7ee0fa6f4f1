"""A decode step with one core busy, by threads and spinning: python busy_core.py BUNDLE... [--rounds N]

The busy core is held by a process that computes all the time and may use no other core; the bundle's threads may use
every core. In a round every setting has its turn idle and then busy: a prompt of 128 tokens and 64 steps after it. All
settings are sessions of this process; threads of those that wait sleep.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import numpy as np

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.ort.runners import OrtRunner
from doge_deploy.runtime.ort.session import SPIN_US

PROMPT, STEPS = 128, 64
SPINS = (SPIN_US, 0, 1000)
"""Microseconds; the first is the default."""

BUSY = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile True: pass"


@contextlib.contextmanager
def busy(core: int) -> Iterator[None]:
    """Keep a core busy."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(core)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise click.ClickException(f"core {core}: no process could be tied to it")
        yield
    finally:
        process.kill()
        process.communicate()


def step_times(runner: OrtRunner) -> list[float]:
    """Milliseconds of each step of a text."""
    runner.reset(1)
    logits = runner.run(np.arange(3, 3 + PROMPT)[None])
    times = []
    for _ in range(STEPS):
        token = logits[:, -1].argmax(-1)[:, None]
        start = perf_counter()
        logits = runner.run(token)
        times.append(1000 * (perf_counter() - start))
    return times


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=9, show_default=True)
def main(bundles: tuple[Path, ...], rounds: int) -> None:
    """Time the steps of BUNDLES with one core busy, by threads and spinning."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise click.ClickException("one core: a busy one leaves none; this needs two or more")
    settings = [(len(cores), spin) for spin in SPINS] + [(len(cores) - 1, SPINS[0])]
    print(
        "| bundle | threads, spin | idle, ms (90th percentile) | one core busy | over idle, smallest to largest round |"
    )
    print("| --- | --- | --- | --- | --- |")
    for path in bundles:
        bundle = open_bundle(path)
        runners = {one: open_runner(bundle, threads=one[0], spin=one[1]) for one in settings}
        idle: dict[tuple[int, int], list[list[float]]] = {one: [] for one in settings}
        held: dict[tuple[int, int], list[list[float]]] = {one: [] for one in settings}
        for number in range(rounds + 1):
            for found, surroundings in ((idle, contextlib.nullcontext()), (held, busy(cores[-1]))):
                with surroundings:
                    for one, runner in runners.items():
                        times = step_times(runner)
                        if number:  # the first round is warm-up
                            found[one].append(times)
        for threads, spin in settings:
            first, second = idle[threads, spin], held[threads, spin]
            ratios = [median(b) / median(a) for a, b in zip(first, second, strict=True)]
            ratio = f"{np.median(second) / np.median(first):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {path} | {threads}, {spin} us | {_times(first)} | {_times(second)} | {ratio} |", flush=True)


def _times(rounds: list[list[float]]) -> str:
    return f"{np.median(rounds):.2f} ({np.quantile(rounds, 0.9):.2f})"


if __name__ == "__main__":
    main()
