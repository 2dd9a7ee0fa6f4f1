"""Every block of README and docs/ is executed by a session of nox, or says why not; a few pages are run here.

`nox -s pages` runs all that no other session runs. `nox -s pages -- --count` prints the table of this file.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from page_blocks import KINDS, RUN, blocks, commands, run_by
from run_pages import FAST, ROOT, all_pages, count

import doge_deploy

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOX = (ROOT / "noxfile.py").read_text(encoding="utf-8")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_a_session(name: str) -> bool:
    return f'name="{name}"' in NOX or f"def {name}(" in NOX


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = blocks(text)
    owner = run_by(text)
    assert owner is None or is_a_session(owner), f"no session of nox is called {owner}"
    assert owner is not None or page in all_pages() or not any(block.runs for block in found)
    for block in found:
        if block.language == "console" and block.runs:
            assert commands(block.text)
        if session := block.marks.get("run by"):
            assert is_a_session(re.split(r"[:,]", session)[0])
        if block.not_run:
            assert len(block.not_run.split()) > 3, f"line {block.line}: a reason is more than a word"
    fences = re.findall(r"^```\w+", text, re.MULTILINE)
    joined = sum(block.output is not None for block in found)
    assert len(fences) == sum(block.language != "" for block in found) + joined, "a block was not found"


def test_the_count_of_blocks() -> None:
    """What is run, and why the rest is not; `--count` prints it."""
    found = count()
    assert found["executed"] > 100
    kinds = {kind: number for kind, number in found.items() if kind in KINDS}
    assert 0 < sum(kinds.values()) < found["executed"] / 3
    total = Counter(block.language in RUN for page in PAGES for block in blocks(page.read_text(encoding="utf-8")))
    assert total[True] == sum(number for key, number in found.items() if key != "shown")


def test_commands_that_need_a_device_are_not_many() -> None:
    assert count()["device"] <= 8


@pytest.mark.parametrize("page", FAST)
def test_a_page_that_takes_seconds(page: str, tiny_bundle: Path) -> None:
    """The others take minutes: `nox -s pages`."""
    command = [sys.executable, "tests/pages/run_pages.py", "--have", f"build/doge-tiny={tiny_bundle}", page]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_output_fails(tmp_path: Path) -> None:
    """The same page with the right version and with another one."""
    sound = "```console\n$ doge-deploy --version\ndoge-deploy, version {}\n```\n"
    for version, code in ((doge_deploy.__version__, 0), ("0.0.9", 1)):
        (tmp_path / "page.md").write_text(sound.format(version))
        command = [sys.executable, "tests/pages/run_pages.py", str(tmp_path / "page.md")]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == code
