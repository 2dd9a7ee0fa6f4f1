"""Every number of the weight file against the checkpoint: proof for what no replayed text happens to use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open

from doge_deploy.bundle import Bundle
from doge_deploy.checkpoint import Checkpoint, task_tensors
from doge_deploy.graph.passes.transpose_weights import TRANSPOSED_SUFFIX
from doge_deploy.graph.weights import WEIGHTS_FILE
from doge_deploy.model.rope import rope_tensors


@dataclass(frozen=True)
class WeightsResult:
    """What the comparison found."""

    compared: int
    """Tensors of the weight file."""
    failures: tuple[str, ...]
    """A line per tensor that differs or is missing."""

    @property
    def passed(self) -> bool:
        return not self.failures


def compare_weights(bundle: Bundle, checkpoint: Checkpoint) -> WeightsResult:
    """Each tensor of the weight file must be the checkpoint's, rounded to the stored dtype, bit for bit."""
    rope = rope_tensors(checkpoint.config, checkpoint.facts, bundle.manifest.max_length)
    failures, found = [], set()
    with safe_open(bundle.path / WEIGHTS_FILE, framework="pt") as file:
        names = sorted(file.keys())
        for name in names:
            source = name.removesuffix(TRANSPOSED_SUFFIX)
            found.add(source)
            if source not in rope and source not in checkpoint.tensors:
                failures.append(f"{name} is not a tensor of the checkpoint")
                continue
            expected = rope[source] if source in rope else checkpoint.read(source)
            failures += _difference(name, file.get_tensor(name), expected.T if name != source else expected)
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
