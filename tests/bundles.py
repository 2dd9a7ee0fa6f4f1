"""Bundles for tests: made by the real export, and broken on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import shared_files
import torch
import translations
from safetensors import safe_open

from doge_deploy.bundle.files import file_entries
from doge_deploy.bundle.opening import open_bundle
from doge_deploy.bundle.writing import write_manifest
from doge_deploy.options.export import ExportOptions
from doge_deploy.pipelines.export import export
from doge_deploy.runtime.ort import graph_file

translations.collect_once()


class NoProgress:
    """Tells nobody."""

    def stage(self, name: str, total: int = 1) -> Callable[[int], None]:
        return lambda done: None


def make_bundle(model: str | Path, output: Path, **options: Any) -> Path:
    """Export `model` to `output` with the given `ExportOptions`."""
    export(str(model), output, ExportOptions(**options), force=False, progress=NoProgress())
    return output


def shared_bundle(model: str | Path, **options: Any) -> Path:
    """The same as `make_bundle`, exported once for all tests of a session; do not write into it.

    Not for tests of the export itself: what they replace in it must neither come from here nor stay here.
    """
    key = [shared_files.content(model) if isinstance(model, Path) else model, options]
    name = model.name if isinstance(model, Path) else model
    return shared_files.made_once(name, ["bundle", *key], lambda path: make_bundle(model, path, **options))


def own_bundle(target: Path, model: str | Path, **options: Any) -> Path:
    """A copy of `shared_bundle` at `target`, which the test may write into."""
    return Path(shutil.copytree(shared_bundle(model, **options), target))


def broken_copy(
    bundle: Path,
    target: Path,
    *,
    graph: Callable[[ir.Model], None] | None = None,
    weights: Any = None,
    portable: bool = False,
) -> Path:
    """A copy whose first graph (the one that is run) or weight file was changed; its manifest's hashes are made to fit.

    `portable` takes the standard graph instead. `graph` changes the model in place, `weights`
    is called with the path of the weight file.
    """
    shutil.copytree(bundle, target)
    opened = open_bundle(target)
    file = target / graph_file(opened.layout(), portable=portable)
    if graph is not None:
        model = ir.load(file)
        graph(model)
        ir.save(model, file)
    if weights is not None:
        weights(target / "weights.safetensors")
    write_manifest(target, replace(opened.manifest, files=file_entries(target)))
    return target


def edit_tensor(path: Path, name: str, edit: Callable[[torch.Tensor], None]) -> None:
    """Change one float32 tensor of a safetensors file in place."""
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(name).clone()
    edit(tensor)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    begin, end = eval(data[8 : 8 + header])[name]["data_offsets"]  # the header is a literal of ours
    start = 8 + header
    path.write_bytes(data[: start + begin] + tensor.numpy().tobytes() + data[start + end :])


def edit_bytes(path: Path, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the bytes of one tensor of a safetensors file in place."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8:begin])[name]["data_offsets"]
    changed = edit(np.frombuffer(data[begin + first : begin + last], np.uint8).copy())
    path.write_bytes(data[: begin + first] + changed.tobytes() + data[begin + last :])
