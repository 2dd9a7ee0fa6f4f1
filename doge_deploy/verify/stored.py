"""The checkpoint's weights as a bundle with quantized weights stores them."""

from __future__ import annotations

from functools import partial

import torch

from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.graph.weight_file import read_weight_file
from doge_deploy.graph.weight_formats import WeightFormat
from doge_deploy.verify.reference import Weights


def stored_weights(bundle: Bundle, checkpoint: Checkpoint, weight_format: WeightFormat) -> Weights:
    """What a bundle stores of its checkpoint's weights: per tensor in the format, the numbers that its graph makes."""

    def dequantized(name: str, _weight: torch.Tensor) -> torch.Tensor:
        return weight_format.dequantized(checkpoint.read(name), name)

    found = (weight_format.part_of(name, info.dtype) for name, info in read_weight_file(bundle.path).items())
    names = sorted({part.tensor for part in found if part is not None and part.tensor})
    # another tensor is a finding of `compare_weights`
    return {name: partial(dequantized, name) for name in names if name in checkpoint.tensors}
