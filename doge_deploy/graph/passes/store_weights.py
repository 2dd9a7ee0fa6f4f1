"""Weights in the format that was asked for, in standard operators."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from doge_deploy.graph.rounded_inputs import mark_rounded
from doge_deploy.graph.schemas import CDMOE
from doge_deploy.graph.weight_file import TRANSPOSED_SUFFIX
from doge_deploy.graph.weight_formats import WeightFormat

KNOWN_READERS = {"MatMul", "Gather", "Transpose", CDMOE}
"""Operators that may read a weight which is not stored in the graph's dtype."""


class StoreWeightsPass(ir.passes.InPlacePass):
    """Initializers of linear layers, embedding, head and expert tables are stored in a weight format.

    Needs: initializers in the graph's dtype named as in the checkpoint (with the transpose suffix where
    TransposeWeightsPass ran), data not yet attached.
    Promises: every reader gets the dequantized weight in the graph's dtype; a tied embedding is stored once. Products
    whose input the format rounds in engines are marked.

    1. Fires on 2-D weights that the format does not refuse.
    2. Must not fire on a weight with a reader that is not known.
    """

    def __init__(self, weight_format: WeightFormat) -> None:
        super().__init__()
        self.weight_format = weight_format
        self.left: dict[str, str] = {}
        """2-D checkpoint tensors that were left as they are -> why."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for weight in list(model.graph.initializers.values()):
            if weight.shape is None or len(weight.shape) != 2 or weight.name is None or weight.name.startswith("rope_"):
                continue
            name = weight.name.removesuffix(TRANSPOSED_SUFFIX)
            transposed = name != weight.name
            shape = weight.shape.numpy()[::-1] if transposed else weight.shape.numpy()
            reason = self.weight_format.refusal(name, shape)
            readers = {use.node.op_type for use in weight.uses()}
            if not reason and not readers <= KNOWN_READERS:
                reason = f"it is read by {', '.join(sorted(readers))}"
            if reason:
                self.left[name] = reason
                continue
            scale = self.weight_format.input_scale(name)
            if scale is not None:
                for product in _products(weight):
                    mark_rounded(product, self.weight_format.rounds_inputs_to, scale)
            self.weight_format.rewrite(model.graph, weight, name, transposed=transposed)
        return ir.passes.PassResult(model, True)


def _products(weight: ir.Value) -> Iterator[ir.Node]:
    """The MatMuls whose second input is a weight, transposed or not."""
    for use in weight.uses():
        if use.node.op_type == "Transpose":
            yield from _products(use.node.outputs[0])
        elif use.node.op_type == "MatMul" and use.idx == 1:
            yield use.node
