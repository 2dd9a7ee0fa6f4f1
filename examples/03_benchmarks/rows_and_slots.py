"""What a decode step costs by rows, and by what the slots of a static cache hold: python rows_and_slots.py BUNDLE

All cases take turns, each on caches of as many slots as the bundle has. If a step touched slots that no row uses, a
text of 100 tokens would cost what one of 2000 does; if a row touched slots that only another one uses, seven short rows
beside a long one would cost what eight long ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep

import click
import numpy as np

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.devices.host import usable_threads
from doge_deploy.runtime.base import Runner
from doge_deploy.runtime.ort import open_runner

SHORT, STEPS, LEAD_IN = 100, 24, 4


def cases(longest: int) -> dict[str, list[int]]:
    """Name: how many tokens each row holds."""
    return {
        "1 row of 100": [SHORT],
        "2 rows of 100": [SHORT] * 2,
        "4 rows of 100": [SHORT] * 4,
        "8 rows of 100": [SHORT] * 8,
        f"1 row of {longest}": [longest],
        f"1 row of {longest}, 7 of 100": [longest, *[SHORT] * 7],
        f"8 rows of {longest}": [longest] * 8,
    }


def fill(runner: Runner, held: list[int], vocab_size: int) -> None:
    """Rows of so many random tokens."""
    numbers = np.random.default_rng(0)
    runner.reset(len(held))
    left = np.array(held)
    while left.any():
        width = min(512, int(left.max()))
        real = np.clip(left, 1, width)  # a row that is full gets one token more, which the last lines below undo
        runner.run(numbers.integers(3, vocab_size, (len(held), width)), real.tolist())
        left = np.maximum(left - real, 0)
    runner.row_lengths = np.array(held)


def step_ms(runner: Runner, vocab_size: int, clock: Callable[[], float]) -> float:
    """The median of some steps; each is forgotten again, so that all hold the same."""
    held = runner.row_lengths
    ids = np.random.default_rng(1).integers(3, vocab_size, (len(held), 1))
    times = []
    for _ in range(LEAD_IN + STEPS):
        start = clock()
        runner.run(ids)
        times.append(clock() - start)
        runner.row_lengths = held
    return 1000 * median(times[LEAD_IN:])


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=8, show_default=True)
@click.option("--threads", type=int, help="Default: one a core.")
@click.option("--cpu-time", is_flag=True, help="Of all threads; with one of them other processes disturb it little.")
def cli(bundle: Path, rounds: int, threads: int | None, cpu_time: bool) -> None:
    """Print a table."""
    opened = open_bundle(bundle)
    vocab_size, slots = opened.manifest.facts.vocab_size, opened.manifest.max_length
    rows = cases(slots - 48)
    runners = {name: open_runner(opened, threads=threads, flush_denormals=True) for name in rows}
    for name, held in rows.items():
        fill(runners[name], held, vocab_size)
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, runner in runners.items():
            sleep(0.05)
            found[name].append(step_ms(runner, vocab_size, process_time if cpu_time else perf_counter))
    click.echo(f"{slots} slots, {usable_threads(threads)} threads\n")
    click.echo("| rows | ms a step | over 1 row of 100 |\n| --- | --- | --- |")
    first = next(iter(rows))
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times, found[first], strict=True)]
        spread = f"{median(times) / median(found[first]):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        click.echo(f"| {name} | {median(times):.3f} | {spread} |")


if __name__ == "__main__":
    cli()
