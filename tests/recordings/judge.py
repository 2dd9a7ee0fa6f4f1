"""Judge what prepare.py wrote, by its recordings, where neither torch nor transformers nor onnx is installed.

python judge.py FOLDER
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from time import perf_counter

ABSENT = ("torch", "transformers", "onnx", "onnx_ir", "safetensors")
TEXTS = ("natural text", "greedy")
"""Cases of which a recording holds what lies within the window."""


def judge(folder: Path, bundle: str, recording: str) -> tuple[int, list[str], str]:
    """Exit code, the cases that the error names, and what was said."""
    command = ["doge-deploy", "verify", str(folder / bundle), "--recording", str(folder / recording)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    found = re.search(r"what transformers computes: (.*)", done.stderr)
    return done.returncode, found[1].split(", ") if found else [], done.stderr


def main(folder: Path) -> int:
    """0 if every verdict is that of the live reference."""
    present = [name for name in ABSENT if importlib.util.find_spec(name) is not None]
    assert not present, f"installed: {present}"
    wrong = 0
    expected = json.loads((folder / "expected.json").read_text())
    for name, entry in expected.items():
        begin = perf_counter()
        code, failed, error = judge(folder, name, entry["recording"])
        live = [case for case in entry["fails"] if not case.endswith(TEXTS)]
        right = code == bool(live) and [case for case in failed if not case.endswith(TEXTS)] == live
        wrong += not right
        size = (folder / entry["recording"]).stat().st_size / 1e6
        verdict = "as the live reference" if right else f"NOT as the live reference: {code}, {failed}, {error}"
        sys.stdout.write(
            f"{name}: exit {code}, {len(failed)} cases fail, {perf_counter() - begin:.1f} s, {size:.1f} MB; {verdict}\n"
        )
    code, _, error = judge(folder, "tiny", "moe.recording")
    refused = code == 3 and "checkpoint is" in error
    sys.stdout.write(f"a recording of another checkpoint: exit {code}\n")
    return 1 if wrong or not refused else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
