"""Two versions of the sources: are the bundles that they export the same files, and is one of them slower?

    python tests/two_versions.py export BEFORE AFTER FOLDER MODEL... [--quantize none --quantize int8 --quantize int4]
    python tests/two_versions.py time BEFORE AFTER FOLDER NAME... [--rounds 20] [--steps 40]
    python tests/two_versions.py exports BEFORE AFTER MODEL... [--rounds 5]

BEFORE and AFTER are folders with the sources of a commit (`git archive COMMIT | tar x -C BEFORE`); both run in this
environment. `export` makes `FOLDER/before/NAME` and `FOLDER/after/NAME`, and says of each file except manifest.json
whether it is the same, and which keys of the manifest differ. `time` lets each version decode its own bundle in a
process of its own, in turns, so that never both run, and prints the ratios of the rounds: below 1, AFTER is slower.
`exports` times whole processes of `export`, in turns with one that imports what the libraries have loaded by the end of
AFTER's, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from time import perf_counter
from typing import Any

import click

MANIFEST = "manifest.json"

WORKER = """
import sys, time
import numpy as np
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.runtime.ort import open_runner
path, steps = sys.argv[1], int(sys.argv[2])
runner = open_runner(open_bundle(path), threads=int(sys.argv[3]))
ids = np.arange(64)[None]
for line in sys.stdin:
    runner.reset(1)
    runner.run(ids)
    begin = time.perf_counter()
    for step in range(steps):
        runner.run(np.array([[step]]))
    print((time.perf_counter() - begin) / steps, flush=True)
"""
"""Answers each line with the seconds of a decode step."""


LOADED = """
import sys
from doge_deploy.cli.main import run_command
assert run_command(["export", sys.argv[1], "-o", sys.argv[2]]) == 0
with open(sys.argv[3], "w") as file:
    file.writelines(f"{name}\\n" for name in sys.modules if not name.startswith(("doge_", "__")))
"""
"""Writes down the modules of libraries that an export has loaded, in their order."""

IMPORTS = """
import contextlib, importlib, sys
for name in open(sys.argv[1]).read().split():
    with contextlib.suppress(Exception):  # some are no files: their libraries make them
        importlib.import_module(name)
"""


def prepare(sources: Path) -> None:
    """Let Python find the entry points of these sources, not those of the installed ones."""
    project = tomllib.loads((sources / "pyproject.toml").read_text())["project"]
    folder = sources / "doge_deploy-0.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def environment(sources: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(sources.resolve())}


def hashes(bundle: Path) -> dict[str, str]:
    return {
        str(file.relative_to(bundle)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(bundle.rglob("*"))
        if file.is_file()
    }


def different_keys(one: Any, two: Any, name: str = "") -> list[str]:
    """Names of the values in which two documents differ; what they say of files' hashes is told by `hashes`."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted({*one, *two})
        return [
            found for key in keys for found in different_keys(one.get(key), two.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if one == two else [name]


def exported(sources: Path, model: str, out: Path, quantize: str) -> None:
    few = [] if quantize == "none" else ["--quantize", quantize]
    command = [sys.executable, "-m", "doge_deploy.cli", "export", model, "-o", str(out), "--kv-cache", "static", *few]
    subprocess.run(command, env=environment(sources), check=True, cwd=sources, stderr=subprocess.DEVNULL)


@click.group()
def main() -> None:
    """See above."""


@main.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--quantize", "formats", multiple=True, default=("none", "int8", "int4"), show_default=True)
def export(before: Path, after: Path, folder: Path, models: tuple[str, ...], formats: tuple[str, ...]) -> None:
    """Export MODELS by both versions; the exit status is 1 where a file differs."""
    wrong = False
    for sources in (before, after):
        prepare(sources)
    for model in models:
        for quantize in formats:
            name = f"{Path(model).name}-{quantize}"
            pair = [folder.resolve() / side / name for side in ("before", "after")]
            for sources, out in zip((before, after), pair, strict=True):
                if not out.exists():
                    out.parent.mkdir(parents=True, exist_ok=True)
                    exported(sources, model if "/" not in model else str(Path(model).resolve()), out, quantize)
            one, two = (hashes(path) for path in pair)
            differ = sorted(file for file in {*one, *two} - {MANIFEST} if one.get(file) != two.get(file))
            keys = different_keys(*(json.loads((path / MANIFEST).read_text()) for path in pair))
            print(
                f"{name}: {len({*one, *two}) - 1 - len(differ)} files the same, different: {differ}; manifest: {keys}"
            )
            wrong = wrong or bool(differ)
    sys.exit(int(wrong))


@main.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--rounds", default=5, show_default=True)
def exports(before: Path, after: Path, models: tuple[str, ...], rounds: int) -> None:
    """Whole processes that export MODELS in float32, by both versions in turns with the imports alone."""
    for sources in (before, after):
        prepare(sources)
        subprocess.run([sys.executable, "-m", "compileall", "-q", sources / "doge_deploy"], check=True)
    for model in models:
        path = model if "/" not in model else str(Path(model).resolve())
        with tempfile.TemporaryDirectory(dir=after) as name:
            folder = Path(name)
            run(after, "-c", LOADED, path, str(folder / "bundle"), str(folder / "modules"))

            def turn(sources: Path, *arguments: str, bundle: Path = folder / "bundle") -> float:
                shutil.rmtree(bundle, ignore_errors=True)
                begin = perf_counter()
                run(sources, *arguments)
                return perf_counter() - begin

            export = ("-m", "doge_deploy.cli", "export", path, "-o", str(folder / "bundle"))
            kinds = [(before, *export), (after, *export), (after, "-c", IMPORTS, str(folder / "modules"))]
            seconds = [[turn(*kind) for kind in kinds] for _ in range(rounds + 1)][1:]  # the first warms up
        one, two, alone = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(f"{model}: before {one:.2f} s, after {two:.2f} s, imports alone {alone:.2f} s; {rounds} rounds")
        for name, first, second in (
            ("after over before", 1, 0),
            ("after over imports", 1, 2),
            ("before over imports", 0, 2),
        ):
            ratios = [row[first] / row[second] for row in seconds]
            quarters = statistics.quantiles(ratios, n=4)
            print(f"  {name}: median {statistics.median(ratios):.3f}, quarters {quarters[0]:.3f} to {quarters[2]:.3f}")


def run(sources: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment(sources), cwd=sources, check=True, capture_output=True, text=True)


@main.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, required=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--steps", default=40, show_default=True)
@click.option("--threads", default=2, show_default=True)
def time(
    before: Path, after: Path, folder: Path, names: tuple[str, ...], rounds: int, steps: int, threads: int
) -> None:
    """Decode steps of NAMES, by both versions in turns."""
    for name in names:
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(folder.resolve() / side / name), str(steps), str(threads)],
                env=environment(sources),
                cwd=sources,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for side, sources in (("before", before), ("after", after))
        ]

        def turn(worker: subprocess.Popen[str]) -> float:
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            return float(worker.stdout.readline())

        seconds: list[list[float]] = []
        for number in range(rounds + 2):  # the first two warm up
            order = workers if number % 2 else workers[::-1]
            found = {worker.args[3]: turn(worker) for worker in order}  # type: ignore[index]
            seconds.append([found[worker.args[3]] for worker in workers])  # type: ignore[index]
        for worker in workers:
            worker.communicate()
        ratios = sorted(one / two for one, two in seconds[2:])
        half = [statistics.median(column) * 1e3 for column in zip(*seconds[2:], strict=True)]
        print(
            f"{name}: before {half[0]:.3f} ms, after {half[1]:.3f} ms a step; ratio of {rounds} rounds: median "
            f"{statistics.median(ratios):.3f}, quarters {ratios[rounds // 4]:.3f} to {ratios[3 * rounds // 4]:.3f}, "
            f"all {ratios[0]:.3f} to {ratios[-1]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
