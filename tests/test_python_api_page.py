"""The Python blocks of docs/python-api.md run in their order, and print what their comments say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "python-api.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def promised(block: str) -> list[str]:
    """Comments behind `print`: the words of a line of output, "..." for a rest that varies."""
    return re.findall(r"^ *print\(.*\)  # (.+)$", block, re.MULTILINE)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each block prints; they share one process, as in a session of a reader."""
    code = f"\nprint({(mark := '-- next block --')!r})\n".join(BLOCKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path_factory.mktemp("page")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.split(mark + "\n")


def test_every_block_runs(outputs: list[str]) -> None:
    assert len(outputs) == len(BLOCKS) >= 8


def test_comments_say_what_is_printed(outputs: list[str]) -> None:
    for block, output in zip(BLOCKS, outputs, strict=True):
        for words in promised(block):
            if words.startswith("without "):  # of this machine
                continue
            start = words.removesuffix("...")
            lines = output.splitlines()
            assert any(line.startswith(start) if words.endswith("...") else line == start for line in lines), words


def test_text_and_finish_reason(outputs: list[str]) -> None:
    generated = next(out for block, out in zip(BLOCKS, outputs, strict=True) if "finish_reason" in block)
    assert re.search(r"^max_new_tokens 20$|^eos \d+$", generated, re.MULTILINE)
