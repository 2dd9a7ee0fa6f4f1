"""The order of the lowering for ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

from doge_deploy.bundle.signature import SHARES_BUFFERS, SLOT_INDICES
from doge_deploy.graph.stages import MADE_BY
from doge_deploy.targets.ort.attention import FuseAttentionPass
from doge_deploy.targets.ort.experts import RoutedExpertsPass
from doge_deploy.targets.ort.grouped_query import FUSED_ATTENTION_SINCE
from doge_deploy.targets.ort.growing_attention import FuseGrowingAttentionPass
from doge_deploy.targets.ort.head import TiedHeadPass
from doge_deploy.targets.ort.linears import PackLinearsPass
from doge_deploy.targets.ort.logit_rows import LogitRowsPass
from doge_deploy.targets.ort.long_calls import UnpackInCallPass
from doge_deploy.targets.ort.matching import Declined
from doge_deploy.targets.ort.norms import FuseNormsPass
from doge_deploy.targets.ort.quantized import QuantizedWeightsPass

PASSES: tuple[type[ir.passes.PassBase], ...] = (
    QuantizedWeightsPass,
    RoutedExpertsPass,
    FuseAttentionPass,
    PackLinearsPass,
    TiedHeadPass,
    FuseNormsPass,
    LogitRowsPass,
)
"""For the static layout, in the order in which they run."""

LONG_PASSES: tuple[type[ir.passes.PassBase], ...] = (
    *(make for make in PASSES if make not in (PackLinearsPass, LogitRowsPass)),
    UnpackInCallPass,
    LogitRowsPass,
)
"""For calls of many tokens of the static layout with quantized weights, see `long_calls`. Weights are not joined: that
would be done in every call.
"""

GROWING_PASSES: tuple[type[ir.passes.PassBase], ...] = (
    QuantizedWeightsPass,
    FuseGrowingAttentionPass,
    RoutedExpertsPass,
    PackLinearsPass,
    TiedHeadPass,
    FuseNormsPass,
)
"""For the growing layout: its attention must still see how experts are routed."""


@dataclass(frozen=True)
class Lowering:
    """A lowered graph and how it came about."""

    model: ir.Model
    applied: tuple[str, ...]
    """Names of the passes that changed the graph."""
    declined: dict[str, str]
    """Name of a pass that did not apply -> why."""

    @property
    def drops_keys(self) -> bool:
        """The graph has the signature of `doge_deploy.bundle.signature.windowed`."""
        return any(value.name == SLOT_INDICES for value in self.model.graph.inputs)

    @property
    def gives_logit_rows(self) -> bool:
        """The graph has the signature of `doge_deploy.bundle.signature.with_logit_rows`."""
        return LogitRowsPass.__name__ in self.applied

    @property
    def shares_buffers(self) -> bool:
        """Past and present of the growing graph may be the same buffers."""
        return SHARES_BUFFERS in self.model.metadata_props

    @property
    def requires(self) -> str:
        """The oldest ONNX Runtime that runs the graph; "" for any that runs bundles."""
        fused = {FuseAttentionPass.__name__, FuseGrowingAttentionPass.__name__} & set(self.applied)
        return FUSED_ATTENTION_SINCE if fused else ""


def lower(model: ir.Model, passes: Sequence[type[ir.passes.PassBase]] = PASSES) -> Lowering:
    """Rewrite a bundle's standard graph, in place, into a fast form for ONNX Runtime's CPU provider.

    Args:
        model: the graph as exported; its inputs and outputs stay the same, except for one that may be left out.
        passes: what to apply, in order. A pass that declines leaves the graph as it was; one that finds nothing to
            do does so without a reason.
    """
    applied: list[str] = []
    declined: dict[str, str] = {}
    dtype = model.graph.outputs[0].dtype
    if dtype != ir.DataType.FLOAT:
        reason = f"the graph computes in {dtype}; the CPU provider's fused operators are used in FLOAT only"
        return Lowering(model, (), {make.__name__: reason for make in passes})
    for make in passes:
        name = make.__name__
        before = set(model.graph)
        try:
            result = make()(model)
        except Declined as declining:
            declined[name] = str(declining)
        else:
            model = common.RemoveUnusedNodesPass()(result.model).model
            if result.modified:
                applied.append(name)
            for node in model.graph:
                if node not in before:
                    makers = [*node.metadata_props.get(MADE_BY, "").split(), name]
                    node.metadata_props[MADE_BY] = " ".join(makers)
    model = common.CommonSubexpressionEliminationPass()(model).model
    model = common.RemoveUnusedFunctionsPass()(model).model  # type: ignore[no-untyped-call]
    model = common.RemoveUnusedOpsetsPass()(model).model
    return Lowering(model, tuple(applied), declined)
