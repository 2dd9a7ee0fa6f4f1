"""Workflows for actionlint: the example of docs/parity-in-ci.md, and the steps of action.yml as a job.

actionlint reads workflows and no actions, so the steps stand in a workflow that has the action's inputs as its own.

    python tests/action/workflows.py FOLDER          # writes them, and prints their paths
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def workflows() -> dict[str, str]:
    """By name of the file."""
    page = (ROOT / "docs" / "parity-in-ci.md").read_text(encoding="utf-8")
    example = re.search(r"^## GitHub\n.*?^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert example
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    inputs = {
        name: {"description": entry["description"], "type": "string", "default": entry["default"]}
        for name, entry in action["inputs"].items()
    }
    steps = {
        "name": "steps",
        "on": {"workflow_call": {"inputs": inputs}},
        "jobs": {"steps": {"runs-on": "ubuntu-latest", "steps": action["runs"]["steps"]}},
    }
    return {"example.yml": example[1], "steps.yml": yaml.safe_dump(steps, sort_keys=False, width=1000)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in workflows().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)
