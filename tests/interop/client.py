"""What the clients share; plain Python, since their environments have nothing of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

Rows = list[list[int]]

DOCS = Path(__file__).parents[2] / "docs" / "interop.md"
EXAMPLE = "dense-last-logits"
"""The case whose bundle the page's example is run on: options as on the page."""


def compare(run: Callable[[Path, dict[str, Any]], Rows], section: str) -> None:
    """Run a client on every case of the directory in `sys.argv[1]`; exit with 1 if a token differs.

    Args:
        run: called with a bundle and its entry of expected.json; returns the tokens that follow each prompt.
        section: of docs/interop.md, whose example is run too.
    """
    directory = Path(sys.argv[1])
    failed = False
    for name, case in json.loads((directory / "expected.json").read_text()).items():
        for row, (found, wanted) in enumerate(zip(run(directory / name, case), case["tokens"], strict=True)):
            agreeing = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(found, wanted, strict=False))))
            print(f"{name} row {row}: {agreeing} of {len(wanted)} tokens as doge-deploy generate", flush=True)
            if found != wanted:
                failed = True
                print(f"  found  {found}\n  wanted {wanted}")
    failed |= not run_example(section, directory / EXAMPLE)
    sys.exit(failed)


def run_example(section: str, bundle: Path) -> bool:
    """Run the Python block of a section of docs/interop.md on a bundle; it must print the text of `generate`."""
    page = DOCS.read_text(encoding="utf-8").split(f"\n## {section}\n")[1]
    code = page.split("```python\n")[1].split("```")[0].replace("build/doge-tiny", str(bundle))
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    wanted = json.loads((bundle.parent / "expected.json").read_text())[bundle.name]["text"]
    same = output.rstrip("\n").endswith(wanted)
    print(f"the example of docs/interop.md prints {'the' if same else 'another'} text", flush=True)
    return same
