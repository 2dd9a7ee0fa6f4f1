"""Every number of the weight file against the checkpoint: proof for what no replayed text happens to use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open

from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint import Checkpoint, task_tensors
from doge_deploy.graph.passes.quantize_weights import QuantizedParts, part_of, scheme_of
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
    """Each tensor of the weight file must be the checkpoint's, rounded or quantized as stored, bit for bit."""
    rope = rope_tensors(checkpoint.config, checkpoint.facts, bundle.manifest.max_length)
    failures, found = [], set()
    with safe_open(bundle.path / WEIGHTS_FILE, framework="pt") as file:
        names = sorted(file.keys())
        scheme = scheme_of(bundle.manifest.options)
        quantized = None if scheme is None else QuantizedParts(checkpoint, scheme)
        parts = {name: part for name in names if scheme is not None and (part := part_of(name, scheme)) is not None}
        for name in names:
            source = parts[name][0] if name in parts else name.removesuffix(TRANSPOSED_SUFFIX)
            found.add(source)  # "" for what no single tensor is the source of
            stored = file.get_tensor(name)
            if name in parts and quantized is not None and (not source or source in checkpoint.tensors):
                failures += _difference(name, stored.reshape(-1), quantized.data(name).reshape(-1))
            elif source in rope or source in checkpoint.tensors:
                expected = rope[source] if source in rope else checkpoint.read(source)
                failures += _difference(name, stored, expected.T if name != source else expected)
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
