"""The order of the lowering for ONNX Runtime's CUDA provider.

It is the standard graph with its bodies inlined, as TensorRT's parser gets it: the provider has kernels for the same
operators of opset 24. What is added is small: weights of few bits in the provider's own operators, one mask of
causality for all layers, how many keys each row holds, and the likeliest token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.graph.passes.inline_functions import InlineFunctionsPass
from doge_deploy.graph.passes.name_nodes import NameNodesPass
from doge_deploy.targets.cuda.attention_lengths import AttentionLengthsPass
from doge_deploy.targets.cuda.best_tokens import BestTokensPass
from doge_deploy.targets.cuda.placement import Placement, place
from doge_deploy.targets.cuda.shared_sizes import SharedSizesPass
from doge_deploy.targets.cuda.signed_weights import SignedWeightsPass
from doge_deploy.targets.ort.matching import Declined
from doge_deploy.targets.ort.quantized import QuantizedWeightsPass

LOWERED = "doge_deploy.lowered_for"
"""In the metadata of a lowered graph: the backend."""

_SELECTION = re.compile(r"(kept|experts)\.\d+")
"""Selections that somebody made outputs."""

DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""What logits can be read in: NumPy has no bfloat16."""


@dataclass(frozen=True)
class Lowering:
    """A lowered graph and how it came about."""

    model: ir.Model
    applied: tuple[str, ...]
    declined: dict[str, str]
    placement: Placement


def lower(model: ir.Model) -> Lowering:
    """Rewrite a bundle's standard static graph, in place, for ONNX Runtime's CUDA provider.

    Args:
        model: with or without its local functions, and maybe with selections as further outputs.

    Raises:
        UnsupportedModelError: it computes in a dtype that this backend does not read.
    """
    dtype = next((value.dtype for value in model.graph.outputs if value.name == "logits"), None)
    if dtype not in DTYPES:
        found = "nothing" if dtype is None else dtype.name.lower()
        raise UnsupportedModelError(
            f"the cuda backend reads logits in float32 or float16, this graph gives {found}: export with --dtype fp16"
        )
    applied: list[str] = []
    declined: dict[str, str] = {}
    if any(_SELECTION.fullmatch(value.name or "") for value in model.graph.outputs):
        model = ir.passes.Sequential(common.InlinePass(), common.RemoveUnusedFunctionsPass())(model).model  # type: ignore[no-untyped-call]
    else:
        model = InlineFunctionsPass()(model).model  # keeps the selections' names, for whoever wants to see them
    passes = (
        QuantizedWeightsPass(accuracy_level=0),
        SignedWeightsPass(),
        SharedSizesPass(),
        AttentionLengthsPass(),
        BestTokensPass(),
    )
    for one in passes:
        name = type(one).__name__
        try:
            result = one(model)
        except Declined as declining:
            declined[name] = str(declining)
            continue
        model = result.model
        if result.modified:
            applied.append(name)
    model = ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedOpsetsPass(),
        NameNodesPass(),
    )(model).model
    model.metadata_props[LOWERED] = "cuda"
    return Lowering(model, tuple(applied), declined, place(model))


def lower_bytes(data: bytes, folder: Path) -> bytes:
    """The same for a serialized graph whose weights lie in `folder`; one that is lowered already stays as it is."""
    model = ir.from_proto(onnx.load_model_from_string(data))
    assert isinstance(model, ir.Model)
    if model.metadata_props.get(LOWERED) == "cuda":
        return data
    ir.external_data.set_base_dir(model.graph, folder)
    lowered: bytes = ir.to_proto(lower(model).model).SerializeToString()
    return lowered
