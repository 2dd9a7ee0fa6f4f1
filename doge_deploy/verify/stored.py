"""The checkpoint's weights as a bundle with quantized weights stores them."""

from __future__ import annotations

from functools import partial

import torch

from doge_deploy.bundle.files import CALIBRATION_TOKENS
from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.graph.feedback import choose_numbers, read_tokens
from doge_deploy.graph.weight_file import read_weight_file
from doge_deploy.graph.weight_formats import WeightFormat, format_of
from doge_deploy.verify.reference import Weights


def weight_format_of(bundle: Bundle, checkpoint: Checkpoint) -> WeightFormat | None:
    """The format of a bundle's weights, which stores a weight of the checkpoint as the export did.

    Numbers that were chosen on a text are chosen anew on its tokens, which are in the bundle.

    Raises:
        BrokenBundleError: they are not.
    """
    manifest = bundle.manifest
    found = format_of(manifest.options)
    if found is not None and found.uses_covariances and CALIBRATION_TOKENS in manifest.files:
        ids = read_tokens(bundle.path, checkpoint.facts.vocab_size)
        routing, length = manifest.options.routing, manifest.max_length
        found.chosen = choose_numbers(checkpoint, ids, found, routing=routing, max_length=length)
    return found


def stored_weights(bundle: Bundle, checkpoint: Checkpoint, weight_format: WeightFormat) -> Weights:
    """What a bundle stores of its checkpoint's weights: per tensor in the format, the numbers that its graph makes."""

    def dequantized(name: str, _weight: torch.Tensor) -> torch.Tensor:
        return weight_format.dequantized(checkpoint.read(name), name)

    found = (weight_format.part_of(name, info.dtype) for name, info in read_weight_file(bundle.path).items())
    names = sorted({part.tensor for part in found if part is not None and part.tensor})
    # another tensor is a finding of `compare_weights`
    return {name: partial(dequantized, name) for name in names if name in checkpoint.tensors}
