"""Make visible what a `doge` node selected."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from doge_deploy.errors import BrokenBundleError
from doge_deploy.graph.functions.cdmoe import EXPERTS
from doge_deploy.graph.functions.dynamic_mask_attention import KEPT
from doge_deploy.graph.schemas import CDMOE, DOMAIN, DYNAMIC_MASK_ATTENTION, ROUTED_EXPERTS, WINDOW_BIAS

SELECTIONS = {
    DYNAMIC_MASK_ATTENTION: (KEPT, ir.DataType.BOOL),
    WINDOW_BIAS: (KEPT, ir.DataType.BOOL),
    CDMOE: (EXPERTS, ir.DataType.INT64),
    ROUTED_EXPERTS: (EXPERTS, ir.DataType.INT64),
}
"""Per operator: the value inside its body that holds the selection, and its dtype."""


class ExposeSelectionsPass(ir.passes.InPlacePass):
    """Give `doge` nodes a second output, also of the graph: the keys or experts that they selected.

    Needs: the bodies of the local functions, in which the value named in `SELECTIONS` exists; `operators` names those
    to expose. (Attention to every visible key selects nothing: there is no such value in its body.)
    Promises: the graph's own outputs are computed as before; the new ones are `kept.<layer>` `[B, S, Q, K]` bool and
    `experts.<layer>` `[N, k]` int64, after the signature's.
    """

    def __init__(self, operators: Collection[str] = tuple(SELECTIONS)) -> None:
        super().__init__()
        self.operators = operators

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for function in model.functions.values():
            if function.domain == DOMAIN and function.name in self.operators:
                function.outputs.append(_find(function, SELECTIONS[function.name][0]))
        counts: dict[str, int] = {}
        for node in model.graph:
            if node.domain != DOMAIN or node.op_type not in self.operators:
                continue
            name, dtype = SELECTIONS[node.op_type]
            layer = counts.setdefault(name, 0)
            counts[name] += 1
            node.resize_outputs(2)
            exposed = node.outputs[1]
            exposed.name, exposed.dtype = f"{name}.{layer}", dtype
            model.graph.outputs.append(exposed)
        return ir.passes.PassResult(model, bool(counts))


def _find(function: ir.Function, name: str) -> ir.Value:
    for node in function:
        for output in node.outputs:
            if output.name == name:
                return output
    raise BrokenBundleError(f"the body of {function.domain}::{function.name} has no value named {name!r}")
