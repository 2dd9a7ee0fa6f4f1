"""Graph passes, one per file; each says what it needs and what it promises."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from doge_deploy.graph.passes.mark_stages import MarkStagesPass
from doge_deploy.graph.passes.name_nodes import NameNodesPass
from doge_deploy.graph.passes.transpose_weights import TransposeWeightsPass
from doge_deploy.graph.schemas import ACTIVATION


def run_passes(model: ir.Model) -> ir.Model:
    """Tidy a fresh trace: every pass here is exact (no number changes)."""
    return ir.passes.Sequential(
        common.ClearMetadataAndDocStringPass(),
        common.InlinePass(lambda function: function.name == ACTIVATION),
        common.IdentityEliminationPass(),
        TransposeWeightsPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        NameNodesPass(),
        MarkStagesPass(),
    )(model).model
