"""The lowered graph as a file of the bundle, and what the manifest says of it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from doge_deploy.bundle.manifest import Layout, Lowered
from doge_deploy.bundle.signature import windowed, with_logit_rows
from doge_deploy.graph.check import check_model
from doge_deploy.targets.ort.lower import GROWING_PASSES, LONG_PASSES, PASSES, lower
from doge_deploy.targets.ort.quantized import QuantizedWeightsPass


def write_lowered(directory: Path, layout: Layout) -> Lowered:
    """Write the layout's graph in the form that ONNX Runtime's CPU provider runs fastest, beside the standard one.

    Args:
        directory: of the bundle; it holds the standard graph and the weights.
        layout: static or growing.

    Returns:
        What the manifest says of it; no file is written where no pass applied.
    """
    passes = GROWING_PASSES if layout.signature.layout == "growing" else PASSES
    lowering = lower(ir.load(directory / layout.file), passes)
    if not lowering.applied:
        return Lowered(None, (), lowering.declined)
    file = layout.file.replace(".onnx", ".ort.onnx")
    ir.save(lowering.model, directory / file)
    drops = lowering.drops_keys
    signature = windowed(layout.signature) if drops else layout.signature
    signature = with_logit_rows(signature) if lowering.gives_logit_rows else signature
    check_model(directory / file, signature)
    long_calls = None
    if layout.signature.layout == "static" and QuantizedWeightsPass.__name__ in lowering.applied:
        long_calls = file.replace(".ort.onnx", ".ort.long.onnx")
        ir.save(lower(ir.load(directory / layout.file), LONG_PASSES).model, directory / long_calls)
        check_model(directory / long_calls, signature)
    return Lowered(
        file, lowering.applied, lowering.declined, lowering.requires, drops, lowering.shares_buffers, long_calls
    )
