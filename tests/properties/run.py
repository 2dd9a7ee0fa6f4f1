"""Draw examples and verify each:  python tests/properties/run.py --examples 300

Ends with the number of examples per feature, and code 1 if one failed. What failed is printed as it can be put into
`regressions.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from time import perf_counter

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from doge_deploy.graph.functions.activations import SUPPORTED
from properties.check import check
from properties.space import Example, examples


def run(count: int, first: int, minutes: float | None) -> int:
    """Number of failed examples."""
    logging.disable_progress_bar()
    console = Console()
    features: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    failed: list[Example] = []
    drawn = 0
    start = perf_counter()

    def verify_one(example: Example) -> None:
        nonlocal drawn
        if minutes is not None and perf_counter() - start > 60 * minutes:
            return
        drawn += 1
        features.update(example.features())
        try:
            failures = check(example, seconds)
        except Exception as error:  # a crash is a finding like any other
            failures = [f"{type(error).__name__}: {error}"]
            traceback.print_exc(limit=-3)
        if failures:
            failed.append(example)
            console.print(f"FAIL {example!r}\n     " + "\n     ".join(failures[:4]), highlight=False, soft_wrap=True)

    # hypothesis varies what it drew before, so that of so many activations one run would leave some out
    names = sorted(SUPPORTED)
    for index, name in enumerate(names):
        share = count // len(names) + (index < count % len(names))
        if share:
            settled = settings(
                max_examples=share,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            seed(len(names) * first + index)(settled(given(examples(name))(verify_one)))()
    table = Table("feature", "examples")
    for name in sorted(features):
        table.add_row(name, str(features[name]))
    console.print(table)
    total = sum(seconds.values())
    console.print("time: " + ", ".join(f"{name} {part / total:.0%}" for name, part in seconds.items()), highlight=False)
    console.print(
        f"{drawn} of {count} examples, seed {first}, {total / max(drawn, 1):.1f} s each: {len(failed)} failed",
        highlight=False,
    )
    return len(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Verify examples from the whole space of configs and calls.")
    parser.add_argument("--examples", type=int, default=300, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=None, help="stop drawing after so long")
    arguments = parser.parse_args()
    sys.exit(min(1, run(arguments.examples, arguments.seed, arguments.minutes)))
