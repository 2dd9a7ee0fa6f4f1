"""What tests/recordings/judge.py judges: bundles, broken ones, recordings, and what a live reference says of each.

    python prepare.py FOLDER [--large]

`nox -s recordings` runs it in the environment of `make setup`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bundles import broken_copy, edit_tensor, make_bundle

from doge_deploy.verify.recording.record import record
from doge_deploy.verify.run import verify

LARGE = Path(__file__).parents[2] / "examples/02_published_sizes/make_random.py"


def one_percent(tensor: torch.Tensor) -> None:
    """Raise the largest number by 1 %."""
    tensor.view(-1)[tensor.abs().flatten().argmax()] *= 1.01


def edited(name: str, edit: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    """A change of one tensor of a weight file."""

    def change(tensor: torch.Tensor) -> None:
        edit(tensor)

    return lambda path: edit_tensor(path, name, change)


BROKEN: dict[str, tuple[str, Callable[[Path], None]]] = {
    "query-weight": ("tiny", edited("model.layers.0.self_attn.q_proj.weight.T", one_percent)),
    "score-weight": ("tiny", edited("model.layers.1.self_attn.dt_proj.weight.T", one_percent)),
    "rotation": ("tiny", edited("rope_cos", lambda table: table.copy_(table.roll(1, 0)))),
    "nan": ("tiny", edited("model.norm.weight", lambda tensor: tensor.__setitem__(3, float("nan")))),
    "router": ("moe", edited("model.layers.1.mlp.router_gate.weight.T", lambda tensor: tensor.copy_(tensor.flip(1)))),
}
"""By name the sound bundle, and what is done to its weights."""


def main(folder: Path, *, large: bool) -> None:
    """Write it all, and `expected.json`: per bundle its recording, and the cases that must fail."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, tuple[str | Path, dict[str, Any]]] = {
        "tiny": ("doge-tiny", {"kv_cache": ("static", "growing")}),
        "moe": ("doge-tiny-moe", {"kv_cache": ("static", "growing")}),
        "int8": ("doge-tiny", {"quantize": "int8"}),
    }
    if large:
        for name, more in (("20M", []), ("20M-window", ["--window", "256"])):
            subprocess.run([sys.executable, str(LARGE), "20M", str(folder / f"{name}.checkpoint"), *more], check=True)
        kinds |= {
            "20M": (folder / "20M.checkpoint", {"kv_cache": ("static", "growing")}),
            "20M-int8": (folder / "20M.checkpoint", {"quantize": "int8"}),
            "20M-window": (folder / "20M-window.checkpoint", {}),
        }
    expected = {}
    for name, (model, options) in kinds.items():
        bundle = make_bundle(model, folder / name, **options)
        reference = str(model) if isinstance(model, Path) else None
        record(bundle, folder / f"{name}.recording", reference=reference, greedy_steps=24)
        expected[name] = {"recording": f"{name}.recording", "fails": []}
    for name, (source, edit) in BROKEN.items():
        broken = broken_copy(folder / source, folder / name, weights=edit)
        expected[name] = {"recording": f"{source}.recording", "fails": verify(broken, greedy_steps=24).failed_cases}
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), large="--large" in sys.argv[2:])
