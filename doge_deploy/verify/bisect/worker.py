"""The process that runs a bundle in an environment of its own; `environment.py` starts it there.

`python -m doge_deploy.verify.bisect.worker BUNDLE CALLS.npz OUTPUTS.npz`; the last line that it prints is JSON.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np


def main(bundle: str, calls_file: str, outputs_file: str) -> None:
    from doge_deploy.bundle.opening import open_bundle
    from doge_deploy.runtime.ort.session import graph_file
    from doge_deploy.verify.bisect.environment import PACKAGES
    from doge_deploy.verify.bisect.run import outputs
    from doge_deploy.verify.cases import Call
    from doge_deploy.verify.compare import Array

    opened = open_bundle(Path(bundle))
    with np.load(calls_file, allow_pickle=False) as file:
        arrays = dict(file)
    found: dict[str, Array] = {}
    counts: dict[str, int] = {}
    graphs: dict[str, str] = {}
    for layout in dict.fromkeys(name.split(".")[0] for name in arrays):
        count = sum(name.startswith(f"{layout}.") for name in arrays) // 2
        calls = tuple(Call(arrays[f"{layout}.{i}.ids"], arrays[f"{layout}.{i}.lengths"]) for i in range(count))
        rows = outputs(opened, layout, calls)
        found |= {f"{layout}.{index}": row for index, row in enumerate(rows)}
        counts[layout] = len(rows)
        graphs[layout] = graph_file(opened.layout(layout))
    np.savez(outputs_file, **found)  # type: ignore[arg-type]
    sys.stdout.write(json.dumps({"versions": _versions(PACKAGES), "graphs": graphs, "outputs": counts}))


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    main(*sys.argv[1:])
