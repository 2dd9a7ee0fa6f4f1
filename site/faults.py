"""The build of the site notices what it should: each fault here, alone in a copy of the pages, must make it fail.

python site/faults.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()

FAULTS = {
    "a link to no file": ("docs/doctor.md", "\n[x](nowhere.md)\n"),
    "a link to no heading": ("docs/doctor.md", "\n[x](export.md#nowhere)\n"),
    "a page that the navigation leaves out": ("docs/orphan.md", "# Orphan\n"),
    "a picture of another host": ("docs/doctor.md", "\n![x](https://example.org/x.png)\n"),
}
"""What is added to which file."""


def fails(tree: Path) -> bool:
    """Whether the build, or the check behind it, ends with an error."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    for command in (["-m", "mkdocs", "build", "--strict"], ["site/check.py", "build/site"]):
        done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True)
        if done.returncode:
            return True
    return False


def main() -> int:
    """Try all; the exit code."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name, "tree")
        left_out = shutil.ignore_patterns(
            ".git", ".venv", ".nox", "build", "*.egg-info", "__pycache__", "demo", ".*_cache"
        )
        shutil.copytree(ROOT, tree, ignore=left_out)
        unnoticed = []
        for title, (file, text) in FAULTS.items():
            path = tree / file
            before = path.read_text(encoding="utf-8") if path.exists() else None
            path.write_text((before or "") + text, encoding="utf-8")
            if not fails(tree):
                unnoticed.append(title)
            if before is None:
                path.unlink()
            else:
                path.write_text(before, encoding="utf-8")
    print(f"not noticed: {', '.join(unnoticed)}" if unnoticed else f"{len(FAULTS)} faults, each noticed")
    return bool(unnoticed)


if __name__ == "__main__":
    sys.exit(main())
