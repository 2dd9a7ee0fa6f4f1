"""Make visible what a `doge` node selected."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

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


def selecting(model: ir.Model) -> tuple[str, ...]:
    """The operators whose local functions in `model` select something."""
    return tuple(
        function.name
        for function in model.functions.values()
        if function.domain == DOMAIN
        and function.name in SELECTIONS
        and any(value.name == SELECTIONS[function.name][0] for value in _made(function))
    )


class ExposeSelectionsPass(ir.passes.InPlacePass):
    """Give the graph more outputs: the keys or experts that its `doge` nodes selected.

    Needs: the bodies of the local functions, in which the value named in `SELECTIONS` exists; `operators` names those
    to expose. (Attention to every visible key selects nothing: there is no such value in its body.) In a graph without
    local functions: the values that `InlineFunctionsPass` left under the names of the new outputs.
    Promises: the graph's own outputs are computed as before; the new ones are `kept.<layer>` `[B, S, Q, K]` bool and
    `experts.<layer>` `[N, k]` int64, after the signature's, in the order of the graph.

    1. Must not leave a selection out without a word: a graph without functions that lacks one is an error.
    """

    def __init__(self, operators: Collection[str] = tuple(SELECTIONS)) -> None:
        super().__init__()
        self.operators = operators

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        exposed = self._of_functions(model) if model.functions else self._of_values(model)
        model.graph.outputs.extend(exposed)
        return ir.passes.PassResult(model, bool(exposed))

    def _of_functions(self, model: ir.Model) -> list[ir.Value]:
        """A second output of every node."""
        for function in model.functions.values():
            if function.domain == DOMAIN and function.name in self.operators:
                function.outputs.append(_find(function, SELECTIONS[function.name][0]))
        counts: dict[str, int] = {}
        found: list[ir.Value] = []
        for node in model.graph:
            if node.domain != DOMAIN or node.op_type not in self.operators:
                continue
            name, dtype = SELECTIONS[node.op_type]
            layer = counts.setdefault(name, 0)
            counts[name] += 1
            node.resize_outputs(2)
            exposed = node.outputs[1]
            exposed.name, exposed.dtype = f"{name}.{layer}", dtype
            found.append(exposed)
        return found

    def _of_values(self, model: ir.Model) -> list[ir.Value]:
        """The values that have the names already."""
        dtypes = dict(SELECTIONS[operator] for operator in self.operators)
        found: list[ir.Value] = []
        for value in _made(model.graph):
            named = re.fullmatch(r"(\w+)\.\d+", value.name or "")
            if named and named[1] in dtypes:
                value.dtype = dtypes[named[1]]
                found.append(value)
        for name in dtypes:
            if not any(str(value.name).startswith(f"{name}.") for value in found):
                raise BrokenBundleError(f"the graph has neither local functions nor a value named {name}.0")
        return found


def _made(of: ir.Function | ir.Graph) -> Iterator[ir.Value]:
    for node in of:
        yield from node.outputs


def _find(function: ir.Function, name: str) -> ir.Value:
    for value in _made(function):
        if value.name == name:
            return value
    raise BrokenBundleError(f"the body of {function.domain}::{function.name} has no value named {name!r}")
