"""Times of calls that feed prompts, without a scheduler and without a server: what every order of prompts is made of.

python prefill.py BUNDLE      lines on standard input, each answered with one of JSON on standard output

    together TOKENS ROWS...   seconds of one call that feeds so many tokens to each of so many rows, for every number
    chunk PROMPT WIDTH        seconds of each piece of WIDTH tokens of a prompt, the next one behind the last
    step HELD ROWS            seconds of a call of one token of each of so many rows that hold so many
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.slots import SlotRunner, open_slots

ROWS = 16


def together(runner: SlotRunner, tokens: int, rows: list[int]) -> list[float]:
    """Seconds of a call for each number of rows, which hold nothing before."""
    times = []
    for count in rows:
        for slot in range(count):
            runner.truncate(slot, 0)
        start = perf_counter()
        runner.extend(list(range(count)), [[7 + slot] * tokens for slot in range(count)]).numpy()
        times.append(perf_counter() - start)
    return times


def chunk(runner: SlotRunner, prompt: int, width: int) -> list[float]:
    """Seconds of each piece."""
    runner.truncate(0, 0)
    times = []
    for begun in range(0, prompt, width):
        start = perf_counter()
        runner.prefill(0, [7] * min(width, prompt - begun)).numpy()
        times.append(perf_counter() - start)
    return times


def step(runner: SlotRunner, held: int, rows: int) -> list[float]:
    """Seconds of a few steps."""
    slots = list(range(1, rows + 1))
    for slot in slots:
        runner.truncate(slot, 0)
        runner.prefill(slot, [7] * held).numpy()
    times = []
    for _ in range(5):
        start = perf_counter()
        runner.decode(slots, [7] * rows).numpy()
        times.append(perf_counter() - start)
    return times


def main() -> None:
    """Answer lines."""
    runner = open_slots(open_bundle(Path(sys.argv[1])), ROWS, flush_denormals=True)
    for _ in range(ROWS):
        runner.acquire()
    for line in sys.stdin:
        name, *numbers = line.split()
        given = [int(number) for number in numbers]
        if name == "together":
            found = together(runner, given[0], given[1:])
        elif name == "chunk":
            found = chunk(runner, *given)
        else:
            found = step(runner, *given)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
