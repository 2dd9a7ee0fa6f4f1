"""Bundles in onnxruntime-node, as docs/interop.md shows it. It makes tokens of ids, so ids are what is passed.

    python node_client.py BUNDLES FOLDER

FOLDER holds what is in node/ and the installed packages, which JavaScript looks for beside the file that it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from client import Rows, compare


def node(script: str, *arguments: str, given: str = "") -> Any:
    """The JSON that a script of FOLDER prints."""
    command = ["node", str(Path(sys.argv[2], script)), *arguments]
    return json.loads(subprocess.run(command, check=True, input=given, stdout=subprocess.PIPE, text=True).stdout)


def run(bundle: Path, case: dict[str, Any]) -> Rows:
    given = {"file": str(bundle / case["file"]), "prompts": case["prompts"], "count": len(case["tokens"][0])}
    rows: Rows = node("client.mjs", given=json.dumps(given))
    return rows


def example(code: str, case: dict[str, Any]) -> bool:
    """Whether the code of the page, given the ids of the prompt, prints those of `generate`."""
    Path(sys.argv[2], "example.mjs").write_text(code, encoding="utf-8")
    found: list[int] = node("example.mjs", json.dumps(case["prompts"][0]))
    return found == case["tokens"][0]


if __name__ == "__main__":
    compare(run, "onnxruntime-node", language="javascript", example=example)
