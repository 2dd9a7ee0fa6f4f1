"""What the clients share; plain Python, since their environments have nothing of ours."""

from __future__ import annotations

import json
import re
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


def compare(
    run: Callable[[Path, dict[str, Any]], Rows],
    section: str,
    *,
    only: Callable[[dict[str, Any]], bool] = lambda case: not case["quantized"],
    files: Callable[[dict[str, Any]], list[str]] = lambda case: [case["file"]],
    bundle: str = EXAMPLE,
    language: str = "python",
    example: Callable[[str, dict[str, Any]], bool] | None = None,
) -> None:
    """Run a client on every case of the directory in `sys.argv[1]`; exit with 1 if a token differs.

    Args:
        run: called with a bundle and its entry of expected.json; returns the tokens that follow each prompt.
        section: of docs/interop.md, whose example is run too.
        only: called with an entry of expected.json; false for a case that this client cannot run, or whose standard
            graph it would run where weights are quantized: `generate` runs the lowered one, which rounds states too.
        files: called likewise; the graphs to run, one after the other, each as the "file" of the entry.
        bundle: the case whose bundle the example is run on.
        language: of the example.
        example: called with the example and the entry of its bundle; true where it makes the right tokens. Where None,
            the example is Python that prints the text.
    """
    directory = Path(sys.argv[1])
    expected = json.loads((directory / "expected.json").read_text())
    failed = False
    for name, case in expected.items():
        if not only(case):
            continue
        for file in files(case):
            made = run(directory / name, {**case, "file": file})
            for row, (found, wanted) in enumerate(zip(made, case["tokens"], strict=True)):
                agreeing = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(found, wanted, strict=False))))
                print(
                    f"{name} {file} row {row}: {agreeing} of {len(wanted)} tokens as doge-deploy generate", flush=True
                )
                if found != wanted:
                    failed = True
                    print(f"  found  {found}\n  wanted {wanted}")
    code = re.sub("build/(doge-tiny|openvino)", str(directory / bundle), code_of(section, language))
    same = (example or prints_the_text)(code, expected[bundle])
    print(f"the example of docs/interop.md prints {'the' if same else 'another'} text", flush=True)
    sys.exit(failed or not same)


def code_of(section: str, language: str) -> str:
    """The first block of a section of docs/interop.md in a language."""
    page = DOCS.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return page.split(f"```{language}\n")[1].split("```")[0]


def prints_the_text(code: str, case: dict[str, Any]) -> bool:
    """Run Python; it must end with printing the text of `generate`."""
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    return output.rstrip("\n").endswith(case["text"])
