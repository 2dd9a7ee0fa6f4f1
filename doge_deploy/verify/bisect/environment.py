"""One bundle in two environments: the same files, so what differs is a package."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from doge_deploy.errors import MissingDependencyError
from doge_deploy.verify.bisect.finding import PACKAGE, Culprit
from doge_deploy.verify.cases import Call
from doge_deploy.verify.compare import Array, largest_error

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "doge-deploy", "onnx", "onnx-ir")
"""What can change the numbers of a bundle that exists, the likeliest first."""

_WORKER = "doge_deploy.verify.bisect.worker"


def compare_environments(
    good: Path, bad: Path, good_python: str | None, bad_python: str | None, calls: Mapping[str, tuple[Call, ...]]
) -> Culprit | None:
    """Run a bundle in two environments.

    Args:
        good, bad: the bundles, which hold the same.
        good_python, bad_python: interpreters; this one where None.
        calls: what is run, by layout.

    Raises:
        MissingDependencyError: an interpreter is not there, or lacks doge-deploy or what runs a bundle.
    """
    one = _run(good, good_python or sys.executable, calls)
    two = _run(bad, bad_python or sys.executable, calls)
    worst, where = 0.0, ""
    for layout in calls:
        amount = largest_error(one.outputs[layout], two.outputs[layout])
        if amount > worst:
            worst, where = amount, layout
    if not worst:
        return None
    changed = [
        f"{name} {one.versions.get(name, 'absent')} -> {two.versions.get(name, 'absent')}"
        for name in PACKAGES
        if one.versions.get(name) != two.versions.get(name)
    ]
    notes = [f"it runs {one.graphs[where]} in one and {two.graphs[where]} in the other"] * (
        one.graphs[where] != two.graphs[where]
    )
    detail = f"the same files give other outputs, by {worst:.1e}"
    name = changed[0] if changed else "that is not known: the packages that run a bundle have the same versions"
    return Culprit(PACKAGE, name, where, worst, detail, [*notes, *(f"also other: {one}" for one in changed[1:])])


class _Result:
    def __init__(self, said: dict[str, Any], arrays: Mapping[str, Array]) -> None:
        self.versions: dict[str, str] = said["versions"]
        self.graphs: dict[str, str] = said["graphs"]
        self.outputs: dict[str, list[Array]] = {
            layout: [arrays[f"{layout}.{index}"] for index in range(count)] for layout, count in said["outputs"].items()
        }


def _run(bundle: Path, python: str, calls: Mapping[str, tuple[Call, ...]]) -> _Result:
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder, "calls.npz"), Path(folder, "outputs.npz")
        arrays = {}
        for layout, items in calls.items():
            for index, call in enumerate(items):
                arrays[f"{layout}.{index}.ids"], arrays[f"{layout}.{index}.lengths"] = call.input_ids, call.lengths
        np.savez(request, **arrays)  # type: ignore[arg-type]
        command = [python, "-m", _WORKER, str(bundle.resolve()), str(request), str(result)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        except OSError as error:
            raise MissingDependencyError(f"{python} cannot be run: {error}") from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MissingDependencyError(f"{python} cannot run the bundle: {reason}")
        with np.load(result, allow_pickle=False) as file:
            return _Result(json.loads(done.stdout.strip().splitlines()[-1]), dict(file))
