"""Names that say where a node belongs and do not depend on how the trace went."""

from __future__ import annotations

import onnx_ir as ir


class NameNodesPass(ir.passes.InPlacePass):
    """Name nodes `<op_type>_<n>`, counted per operator in graph order, and the domain's own `doge.<layer>.<operator>`.

    Needs: nodes in topological order. Promises: unique node names, the same for the same graph.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        counts: dict[str, int] = {}
        for node in model.graph:
            index = counts.setdefault(node.op_type, 0)
            counts[node.op_type] += 1
            # One doge node of each kind per layer, so its count is the layer.
            node.name = f"layers.{index}.{node.op_type}" if node.domain == "doge" else f"{node.op_type}_{index}"
        return ir.passes.PassResult(model, True)
