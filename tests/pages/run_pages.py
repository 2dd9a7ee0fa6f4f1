"""Run the blocks of pages; exit with 1 if an output is not the one on the page.

    python tests/pages/run_pages.py [--bin BIN] [--node NODE] [--section TITLE] [--have NAME=PATH]... [--jobs N] PAGE...

Without PAGE: all that no other session runs, N at a time, by default one a core. BIN is the folder of `doge-deploy`, by
default that of this Python. Each page runs in a folder of its own, which holds what the page says that it begins with:
what `--have` names is copied, the rest is made (page_setups.py). Ports 8000 and up become free ones, in the page and in
the files of examples/05_serve, which lie in the folder too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))

from free_ports import free_ports
from page_blocks import RUN, PageError, begins_with, blocks, commands, run_by
from page_runner import Runner
from page_setups import FILES as FOLDERS
from page_setups import forget, make, put

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "05_serve"

FAST = ("docs/generate.md", "docs/doctor.md", "docs/devices.md")
"""Pages that `make test` runs too."""

PORTS = range(8000, 8003)
"""As the pages and the files write them."""


def all_pages() -> list[Path]:
    """README and every page of docs/ that has something to run and is run by nobody else."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if run_by(text) is None and any(block.runs for block in blocks(text)):
            found.append(page)
    return found


def length(page: Path) -> int:
    """How many commands and programs a page runs."""
    found = [block for block in blocks(page.read_text(encoding="utf-8")) if block.runs]
    return sum(len(commands(block.text)) if block.language == "console" else 1 for block in found)


def count() -> Counter[str]:
    """How many blocks of commands and programs are executed, by whom, and how many are not, by the kind of reason."""
    found: Counter[str] = Counter()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.not_run and block.language in RUN:
                found[block.not_run.partition(": ")[0]] += 1
            elif block.language in RUN:
                found["executed"] += 1
            else:
                found["shown"] += 1
    return found


def run(page: Path, bin_folder: Path, node: Path | None, section: str | None, have: dict[str, Path]) -> Runner:
    """Run a page in a new folder."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shown = page.resolve().relative_to(ROOT) if page.resolve().is_relative_to(ROOT) else page
        runner = Runner(folder, str(shown), bin_folder, node, ports)
        for file in FILES.iterdir():
            if file.is_file():
                (folder / file.name).write_text(runner.substituted(file.read_text()))
                shutil.copymode(file, folder / file.name)
        try:
            for one in begins_with(text):
                put(one, folder, bin_folder, have)
            runner.page(text, section)
        except PageError as error:
            runner.failures.append(f"{page}: {error}")
        finally:
            runner.stop()
    return runner


def side_by_side(pages: Sequence[Path], bin_folder: Path, jobs: int | None) -> int:
    """Run pages in processes of their own, `jobs` at a time, the longest first; what they begin with is made once."""
    names = {name for page in pages for name in begins_with(page.read_text(encoding="utf-8"))} - set(FOLDERS)
    have = [f"--have={name}={make(name, bin_folder)}" for name in sorted(names)]

    def one(page: Path) -> bool:
        command = [sys.executable, __file__, "--bin", str(bin_folder), *have, str(page)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        print(done.stdout, end="", flush=True)
        return done.returncode == 0

    try:
        with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            good = list(pool.map(one, sorted(pages, key=length, reverse=True)))
    finally:
        forget()
    print(f"{sum(good)} of {len(pages)} pages are as they say", flush=True)
    return not all(good)


def main(arguments: Sequence[str]) -> int:
    """Run pages; the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", type=Path, default=Path(sys.executable).parent)
    parser.add_argument("--node", type=Path)
    parser.add_argument("--section")
    parser.add_argument("--have", action="append", default=[])
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--count", action="store_true", help="only count the blocks")
    parser.add_argument("pages", type=Path, nargs="*")
    given = parser.parse_args(arguments)
    if given.count:
        print(", ".join(f"{number} {kind}" for kind, number in count().most_common()))
        return 0
    have = {name: Path(path).resolve() for name, _, path in (one.partition("=") for one in given.have)}
    pages = given.pages or all_pages()
    if len(pages) > 1:
        return side_by_side(pages, given.bin.absolute(), given.jobs)
    failed = ran = 0
    for page in pages:
        begin = time.monotonic()
        runner = run(page, given.bin.absolute(), given.node and given.node.resolve(), given.section, have)
        for line in [*runner.not_run, *runner.failures]:
            print(line, flush=True)
        seconds = time.monotonic() - begin
        print(
            f"{runner.ran} examples of {page.name} were run, {len(runner.failures)} failed, {seconds:.0f} s", flush=True
        )
        failed += len(runner.failures)
        ran += runner.ran
    forget()
    return bool(failed or not ran)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
