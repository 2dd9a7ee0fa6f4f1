"""Replace every call of a local function by its body."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from doge_deploy.graph.passes.expose_selections import ExposeSelectionsPass, selecting
from doge_deploy.graph.passes.name_nodes import NameNodesPass


class InlineFunctionsPass(ir.passes.InPlacePass):
    """Write a graph for runtimes that read no local functions.

    Needs: the bodies of all local functions.
    Promises: the same inputs, outputs and numbers; no local function and no domain but those of the bodies' operators;
    a value that holds what a `doge` node selected is called as `ExposeSelectionsPass` calls its output, so that this
    pass finds it when the node is gone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not model.functions:
            return ir.passes.PassResult(model, False)
        own = len(model.graph.outputs)
        model = ExposeSelectionsPass(selecting(model))(model).model  # names the selections
        model = common.InlinePass()(model).model
        del model.graph.outputs[own:]
        model = ir.passes.Sequential(common.RemoveUnusedOpsetsPass(), NameNodesPass())(model).model
        return ir.passes.PassResult(model, True)
