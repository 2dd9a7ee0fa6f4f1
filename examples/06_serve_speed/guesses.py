"""What guessed tokens bring: texts with and without them in turns, and what calls of several tokens cost.

python guesses.py DIR [--size 20M] [--rounds 5]

Two kinds of text of the same random checkpoint: greedy ones, which repeat themselves after a while as texts that copy
do, and sampled ones at temperature 1, in which nothing repeats. `times` is the median over texts of the time without
guesses over the time with them, and in brackets what that median lies in (95 %). `us a token` is what looking for a
guess takes of the processor, where none is found, beside the time of a step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist, median

import click

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.options.generation import SamplingOptions
from doge_deploy.runtime.generate import generate
from doge_deploy.runtime.rows import RowsRunner
from doge_deploy.runtime.sampling import Sampler
from doge_deploy.runtime.slots import open_slots
from doge_deploy.runtime.speculation import Guesser, exact_length
from doge_deploy.serve.start import measure_step_costs

KINDS = {
    "greedy": SamplingOptions(),
    "sampled": SamplingOptions(do_sample=True, seed=1, temperature=1.0, top_k=0),
}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """What the median lies in (95 %), by the order of the values alone: each lies above it as often as below."""
    ordered, half = sorted(values), NormalDist().inv_cdf(0.975) * len(values) ** 0.5 / 2
    low = max(0, round(len(values) / 2 - half) - 1)
    return ordered[low], ordered[len(values) - 1 - low]


def lookup_seconds(guesser: Guesser, tokens: Sequence[int]) -> float:
    """Of a token of a text in which nothing is found: remembered, and looked for."""
    start = time.perf_counter()
    guesser.begin(tokens[:64])
    for token in tokens[64:]:
        guesser.append(token)
        guesser.draft(8)
    return (time.perf_counter() - start) / len(tokens[64:])


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--size", "sizes", multiple=True, default=("20M", "60M"))
@click.option("--kind", "kinds", multiple=True, default=("fp32", "int8"))
@click.option("--text", "texts", multiple=True, default=tuple(KINDS))
@click.option("--rounds", default=5, show_default=True)
@click.option("--tokens", default=256, show_default=True)
def main(
    directory: Path, sizes: tuple[str, ...], kinds: tuple[str, ...], texts: tuple[str, ...], rounds: int, tokens: int
) -> None:
    """One row a bundle and a kind of text."""
    columns = ("bundle", "text", "guessed tokens that were right", "tok/s without", "with", "times", "us a token")
    click.echo(f"| {' | '.join(columns)} | Q = 2, 4, 8 over 1 |")
    click.echo("| --- " * (len(columns) + 1) + "|")
    for size in sizes:
        for name in kinds:
            bundle = open_bundle(directory / size / name)
            costs = measure_step_costs(open_slots(bundle, 1, flush_denormals=True), rounds=15)
            runner = open_slots(bundle, 1, flush_denormals=True)._runner
            assert isinstance(runner, RowsRunner)
            for kind in texts:
                guesser = Guesser(runner, exact_length(bundle.manifest))
                times: dict[bool, list[float]] = {False: [], True: []}
                for number in range(rounds):
                    prompt = random.Random(number).choices(range(3, 32000), k=64)
                    made = []
                    for guess in (number % 2 == 0, number % 2 == 1):
                        sampler = Sampler(KINDS[kind])
                        helper = guesser if guess else None
                        produced = generate(runner, prompt, sampler, max_new_tokens=tokens, guesser=helper)
                        first = next(produced)
                        start = time.perf_counter()
                        made.append([first, *produced])
                        times[guess].append(time.perf_counter() - start)
                    if made[0] != made[1]:
                        click.echo(f"{size} {name}, {kind}: the texts of seed {number} differ", err=True)
                share = f"{guesser.accepted / guesser.drafted:.2f} of {guesser.drafted}" if guesser.drafted else "none"
                ratios = [a / b for a, b in zip(times[False], times[True], strict=True)]
                low, high = interval(ratios)
                rate = {guess: (tokens - 1) / median(found) for guess, found in times.items()}
                click.echo(
                    f"| {size} {name} | {kind} | {share} | {rate[False]:.0f} | {rate[True]:.0f} "
                    f"| {median(ratios):.3f} ({low:.3f} to {high:.3f}) "
                    f"| {1e6 * lookup_seconds(guesser, random.Random(0).sample(range(3, 32000), 1000)):.1f} "
                    f"of {1e6 / rate[False]:.0f} "
                    f"| {', '.join(f'{costs[width]:.2f}' for width in (2, 4, 8))} |"
                )


if __name__ == "__main__":
    main()
