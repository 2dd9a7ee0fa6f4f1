"""Every number of the weight file against the checkpoint: proof for what no replayed text happens to use."""

from __future__ import annotations

import torch
from safetensors import safe_open

from doge_deploy.bundle.files import WEIGHTS_FILE
from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint import Checkpoint, task_tensors
from doge_deploy.dtypes import DTYPES
from doge_deploy.graph.weight_file import TRANSPOSED_SUFFIX, read_weight_file
from doge_deploy.graph.weight_formats import WeightFormat
from doge_deploy.graph.weights import TensorSources
from doge_deploy.model.rope import rope_tensors
from doge_deploy.verify.oracle import WeightsResult


def compare_weights(bundle: Bundle, checkpoint: Checkpoint, weight_format: WeightFormat | None) -> WeightsResult:
    """Each tensor of the weight file must be the checkpoint's, rounded or quantized as stored, bit for bit.

    `weight_format`: see `weight_format_of`.
    """
    rope = rope_tensors(checkpoint.config, checkpoint.facts, bundle.manifest.max_length)
    failures, found = [], set()
    sources = TensorSources(checkpoint, rope, weight_format)
    infos = read_weight_file(bundle.path)
    names = sorted(infos)
    with safe_open(bundle.path / WEIGHTS_FILE, framework="pt") as file:
        for name in names:
            part = sources.part_of(name, infos[name].dtype)
            source = name.removesuffix(TRANSPOSED_SUFFIX) if part is None else part.tensor
            found.add(source)  # "" for what no single tensor is the source of
            stored = file.get_tensor(name)
            if part is not None and (not source or source in checkpoint.tensors):
                expected = sources.read(name, infos[name].dtype)
                if DTYPES[part.dtype].bits < 8:  # packed into bytes: the shape is another one
                    stored, expected = stored.reshape(-1), expected.reshape(-1)
                failures += _difference(name, stored, expected)
            elif source in rope or source in checkpoint.tensors:
                failures += _difference(name, stored, sources.read(name, str(stored.dtype).removeprefix("torch.")))
            else:
                failures.append(f"{name} is not a tensor of the checkpoint")
    wanted = task_tensors(checkpoint.facts, bundle.manifest.task)
    failures += [f"{name} is not in {WEIGHTS_FILE}" for name in sorted(wanted.keys() - found)]
    return WeightsResult(len(names), tuple(failures))


def _difference(name: str, stored: torch.Tensor, expected: torch.Tensor) -> list[str]:
    if stored.shape != expected.shape:
        return [f"{name} is {list(stored.shape)} instead of {list(expected.shape)}"]
    differing = stored != expected.to(stored.dtype)
    count = int(differing.sum())
    if not count:
        return []
    first = [int(i) for i in differing.nonzero()[0]]
    return [f"{name}: {count} of {stored.numel()} numbers differ from the checkpoint, the first at {first}"]
