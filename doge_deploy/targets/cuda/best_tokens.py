"""The likeliest token of each place, chosen where the logits are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from doge_deploy.bundle.signature import BEST_LOGITS, BEST_TOKENS
from doge_deploy.targets.ort.matching import Declined


class BestTokensPass(ir.passes.InPlacePass):
    """Two more outputs: `best_tokens` and `best_logits`, so that greedy text needs no copy of the logits.

        clean = infinity where the logit is not a number, else the logit
        best_logits `[B, Q]` = the largest of clean; best_tokens `[B, Q]` = the lowest index that has it

    Who reads them takes a `best_logits` that is not finite for "no token", which makes it `Logits.argmax`. The lowest
    index is found by a second TopK, because nothing says which of equals the provider's TopK and ArgMax give; its
    ReduceMin needs cuDNN, which onnxruntime-gpu does not bring.

    Needs: the output `logits` `[B, Q, V]` of a known V. Promises: all other outputs stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        if logits is None or logits.dtype is None or logits.shape is None or not isinstance(logits.shape[-1], int):
            raise Declined("the graph has no logits of a known size")
        vocabulary = logits.shape[-1]
        infinity = _constant(graph, "infinity", np.array(np.inf, logits.dtype.numpy()))
        one = _constant(graph, "one", np.array([1]))
        indices = _constant(graph, "indices", np.arange(vocabulary))
        beyond = _constant(graph, "beyond", np.array(vocabulary))
        axis = _constant(graph, "axis", np.array([-1]))
        clean = _append(graph, "Where", _append(graph, "IsNaN", logits), infinity, logits)
        best = _append(graph, "TopK", clean, one, outputs=2, axis=-1)
        found = _append(graph, "Where", _append(graph, "Equal", clean, best), indices, beyond)
        lowest = _append(graph, "TopK", found, one, outputs=2, axis=-1, largest=0)
        for name, value, dtype in ((BEST_TOKENS, lowest, ir.DataType.INT64), (BEST_LOGITS, best, logits.dtype)):
            output = _append(graph, "Squeeze", value, axis)
            output.name, output.shape, output.dtype = name, ir.Shape(list(logits.shape)[:-1]), dtype
            graph.outputs.append(output)
        return ir.passes.PassResult(model, True)


def _append(graph: ir.Graph, op_type: str, *inputs: ir.Value, outputs: int = 1, **attributes: int) -> ir.Value:
    """The first output of a new node behind all others."""
    node = ir.node(op_type, list(inputs), attributes, num_outputs=outputs)
    for index, output in enumerate(node.outputs):
        output.name = f"best.{len(graph)}.{op_type}.{index}"
    graph.append(node)
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    name = f"best.{name}"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
