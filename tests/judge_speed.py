"""How long `verify` takes by two versions of this tool in turns, and whether both say the same.

    python tests/judge_speed.py BUNDLE CHECKPOINT OLD [--rounds N] [--equal]

OLD is a folder with the `doge_deploy` of the other version (`git archive REVISION doge_deploy | tar -x -C OLD`). Every
run is a process of its own. Printed are seconds by the clock and of the processors, ratios, and the largest relative
difference between the numbers of both reports; with `--equal` one beyond 1e-6 is exit code 1. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

CODE = "from doge_deploy.cli.main import run_command; import sys; sys.exit(run_command(sys.argv[1:]))"
OTHER = ("environment", "command", "bundle", "bundle_sha256")
"""Parts of a report that are not what the judge found."""


def run(code: Path, bundle: Path, checkpoint: str, report: Path) -> tuple[float, float]:
    """Seconds by the clock and of the processors."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    arguments = ["verify", str(bundle.resolve()), "--reference", str(Path(checkpoint).resolve()), "--json", str(report)]
    with subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments],
        env={**os.environ, "PYTHONPATH": str(code)},
        cwd=report.parent,  # where no other `doge_deploy` is
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        _, errors = process.communicate()
    took, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode not in (0, 1):
        raise SystemExit(errors.decode())
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, spent


def differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every place in which two reports differ: the relative difference of numbers, and infinity for anything else."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}/{number}")
    elif isinstance(one, float) and isinstance(other, float):
        if one != other:
            yield path, abs(one - other) / max(abs(one), abs(other))
    elif one != other:
        yield path, float("inf")


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("checkpoint")
@click.argument("old", type=click.Path(path_type=Path))
@click.option("--rounds", default=3)
@click.option("--equal", is_flag=True)
def main(bundle: Path, checkpoint: str, old: Path, rounds: int, equal: bool) -> None:
    new = Path(__file__).parents[1]
    times: dict[str, list[tuple[float, float]]] = {"old": [], "new": []}
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, code in (("old", old), ("new", new)):
                report = Path(folder) / f"{name}.json"
                times[name].append(run(code.resolve(), bundle, checkpoint, report))
                reports[name] = json.loads(report.read_text(encoding="utf-8"))
                took, spent = times[name][-1]
                print(f"{name}: {took:.1f} s, {spent:.1f} s of processors", flush=True)
    ratios = sorted(b[0] / a[0] for a, b in zip(times["old"], times["new"], strict=True))
    print(f"new / old: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {rounds} rounds")
    kept = [{key: value for key, value in report.items() if key not in OTHER} for report in reports.values()]
    found = sorted(differences(*kept), key=lambda pair: -pair[1])
    print(f"{len(found)} places of the reports differ")
    for path, amount in found[:5]:
        print(f"  {path}: {amount:.1e}")
    if equal and found and found[0][1] > 1e-6:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
