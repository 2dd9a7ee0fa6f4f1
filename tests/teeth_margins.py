"""How far beyond its tolerance every planted fault of numbers is, and how small a fault may be to be caught.

    python tests/teeth_margins.py plant FOLDER
    python tests/teeth_margins.py judge FOLDER NEW.json
    PYTHONPATH=OLD_CHECKOUT python tests/teeth_margins.py judge FOLDER OLD.json
    python tests/teeth_margins.py compare OLD.json NEW.json

The faults are those of test_teeth.py and of localize_faults.py, and a ladder of one weight that is off by less and
less. The last command prints a table in Markdown: of every fault the cases that fail, and the smallest and the largest
number of times that a failing case uses its tolerance. It ends with exit code 1 if the newer judge misses what the
older one catches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import shared_files
import torch
from bundles import broken_copy, edit_tensor, shared_bundle
from localize_faults import FAULTS
from verify.test_teeth import attention_body, one_percent, second_routed_as_first, window_plus_one

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.verify.run import verify

LADDER = ("1e-2", "1e-3", "3e-4", "1e-4", "3e-5", "1e-5", "3e-6")
LADDER_WEIGHTS = ("model.layers.0.self_attn.q_proj.weight.T", "model.layers.2.mlp.down_proj.weight.T")
STATIC, GROWING = "static", "growing"
BOTH_LAYOUTS: dict[str, Any] = {"kv_cache": (STATIC, GROWING), "logits": "all"}


def raised(name: str, share: float, path: Path) -> None:
    """Raise the largest number of a tensor by a share of it."""

    def edit(tensor: torch.Tensor) -> None:
        tensor.view(-1)[tensor.abs().flatten().argmax()] *= 1 + share

    edit_tensor(path, name, edit)


def mutations() -> Iterator[tuple[str, Callable[[Path], object], bool, str]]:
    """Name, how to plant it, whether the standard graph has it alone, and the layout that is judged."""
    tiny, mixture = (shared_bundle(model, **BOTH_LAYOUTS) for model in ("doge-tiny", "doge-tiny-moe"))
    facts = open_bundle(tiny).manifest.facts
    for tensor in (
        "model.layers.0.self_attn.q_proj.weight.T",
        "model.layers.1.self_attn.k_proj.weight.T",
        "model.layers.1.self_attn.dt_proj.weight.T",
        "model.layers.2.mlp.down_proj.weight.T",
    ):
        weights = partial(edit_tensor, name=tensor, edit=one_percent)
        yield f"teeth: {tensor} off by 1 %", partial(broken_copy, tiny, weights=weights), False, STATIC

    def score_dropped(path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            kept = "score_bias = Where (kept, {}, hidden)"
            dropped = "no_score = Sub (row_score_cast, row_score_cast)\n    " + kept.format("no_score")
            edit = attention_body(kept.format("row_score_cast"), dropped, patch, facts)
            broken_copy(tiny, path, graph=edit, portable=True)

    def shifted(path: Path) -> None:
        for name in ("rope_cos", "rope_sin"):
            edit_tensor(path, name, lambda table: table.copy_(table.roll(1, 0)))

    def swapped(path: Path) -> None:
        for table in ("down_embed", "up_embed"):
            name = f"model.layers.1.mlp.{table}.weight"
            edit_tensor(path, name, lambda t: t.__setitem__([0, 1], t[[1, 0]].clone()))

    yield "teeth: score term dropped", score_dropped, True, STATIC
    yield "teeth: rotation shifted by one", partial(broken_copy, tiny, weights=shifted), False, STATIC
    for portable in (False, True):
        words = "standard" if portable else "lowered"
        change = partial(broken_copy, portable=portable)
        yield f"teeth: one key too many, {words}", partial(change, tiny, graph=window_plus_one), portable, STATIC
        routed = partial(change, mixture, graph=second_routed_as_first)
        yield f"teeth: routed as its neighbour, {words}", routed, portable, STATIC
    yield "teeth: two experts swapped", partial(broken_copy, mixture, weights=swapped), False, STATIC
    for name, fault in FAULTS.items():
        yield f"localiser: {name}", fault.plant, fault.portable, GROWING if fault.case.startswith(GROWING) else STATIC
    last = shared_bundle("doge-tiny", kv_cache=(STATIC,))  # one row of logits for a call
    for tensor in LADDER_WEIGHTS:
        for share in LADDER:
            weights = partial(raised, tensor, float(share))
            yield f"ladder: {tensor} off by {share}", partial(broken_copy, last, weights=weights), False, STATIC


def plant(folder: Path) -> None:
    folder.mkdir(parents=True)
    shared_files.use_folder(folder / "shared")
    listed = {}
    for number, (name, make, portable, layout) in enumerate(mutations()):
        target = f"{number:02}"
        listed[target] = {"name": name, "portable": portable, "layout": layout}
        make(target=folder / target) if isinstance(make, partial) else make(folder / target)
    (folder / "faults.json").write_text(json.dumps(listed, indent=1))


def judge(folder: Path, output: Path) -> None:
    found = {}
    for target, fault in json.loads((folder / "faults.json").read_text()).items():
        report = verify(folder / target, portable=fault["portable"], layouts=(fault["layout"],), greedy_steps=24)
        found[fault["name"]] = {
            f"{result.layout}/{result.case}": [result.passed, result.load] for result in report.results
        }
        failed = sum(not result.passed for result in report.results)
        sys.stderr.write(f"{fault['name']}: {failed} of {len(report.results)} cases fail\n")
    output.write_text(json.dumps(found, indent=1))


def compare(old: Path, new: Path) -> bool:
    """Whether the newer one catches all that the older one does."""
    before, after = (json.loads(path.read_text()) for path in (old, new))
    lost = []
    print("| fault | cases that fail | smallest share | largest share |\n| --- | --- | --- | --- |")
    for name, cases in before.items():
        shares = [[load for passed, load in side.values() if not passed] for side in (cases, after[name])]
        text = [f"{min(side):.3g}|{max(side):.3g}|{len(side)}" if side else "-|-|0" for side in shares]
        columns = [f"{a} -> {b}" if a != b else a for a, b in zip(*(t.split("|") for t in text), strict=True)]
        print(f"| {name} | {columns[2]} of {len(cases)} | {columns[0]} | {columns[1]} |")
        lost += [name] if shares[0] and not shares[1] else []
    print(f"\n{len(lost)} faults that only the older judge catches{': ' if lost else ''}{', '.join(lost)}")
    return not lost


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    if command == "compare":
        raise SystemExit(not compare(*map(Path, paths)))
    {"plant": plant, "judge": judge}[command](*map(Path, paths))
