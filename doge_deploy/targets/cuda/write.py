"""The graph that is lowered for the CUDA provider as a file of the bundle, and what the manifest says of it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from doge_deploy.bundle.manifest import Layout, Lowered
from doge_deploy.bundle.signature import with_best_tokens
from doge_deploy.graph.check import check_model
from doge_deploy.targets.cuda.lowering import lower

ON_CPU = "CUDAExecutionProvider"
"""Under which name the manifest says which nodes the provider leaves to the CPU, among what was declined."""


def write_lowered(directory: Path, layout: Layout) -> Lowered:
    """Write `model.cuda.onnx` beside the standard graph.

    Args:
        directory: of the bundle; it holds the standard graph and the weights.
        layout: static.

    Raises:
        UnsupportedModelError: the graph computes in a dtype that this backend does not read.
    """
    lowering = lower(ir.load(directory / layout.file))
    file = layout.file.replace(".onnx", ".cuda.onnx")
    ir.save(lowering.model, directory / file)
    check_model(directory / file, with_best_tokens(layout.signature))
    declined = dict(lowering.declined)
    if lowering.placement.cpu:
        declined[ON_CPU] = "; ".join(lowering.placement.cpu)
    return Lowered(file, lowering.applied, declined)
