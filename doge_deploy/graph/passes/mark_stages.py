"""Say which value is the result of which stage; see `doge_deploy.graph.stages`."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from doge_deploy.graph.schemas import CDMOE, DOMAIN, DYNAMIC_MASK_ATTENTION
from doge_deploy.graph.stages import mark, point_name
from doge_deploy.graph.weight_file import TRANSPOSED_SUFFIX

_NORMS = {
    "input_layernorm.weight": "input_norm",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "post_attention_layernorm.weight": "post_norm",
}
_LINEARS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o_proj",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "mlp.router_gate": "router",
}
_RESIDUALS = {"input_residual": "residual", "post_attention_residual": "mlp_residual"}


class MarkStagesPass(ir.passes.InPlacePass):
    """Mark the points of a fresh trace.

    Needs: the graph as `trace` writes it, initializers named as in the checkpoint; one `doge` node of a kind a layer.
    Promises: no number, no node and no name changes.

    1. Must not guess: a point that is not found stays unmarked, and `tests/graph/test_stages.py` holds that there is
       none.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name, weight in model.graph.initializers.items():
            _mark_reader(name.removesuffix(TRANSPOSED_SUFFIX), weight)
        counts = {DYNAMIC_MASK_ATTENTION: 0, CDMOE: 0}
        for node in model.graph:
            if node.domain == DOMAIN and node.op_type in counts:
                layer = counts[node.op_type]
                counts[node.op_type] += 1
                (_mark_attention if node.op_type == DYNAMIC_MASK_ATTENTION else _mark_experts)(node, layer)
        output = model.graph.outputs[0]
        squeezed = output.producer()
        if squeezed is not None and squeezed.op_type == "Squeeze" and squeezed.inputs[0] is not None:
            output = squeezed.inputs[0]  # class logits of one token
        if output.name != "last_hidden_state":  # features end with the norm
            mark(output, ["head"])
        return ir.passes.PassResult(model, True)


def _mark_reader(name: str, weight: ir.Value) -> None:
    """Mark what is computed with a weight, if that is a point."""
    if name == "model.embed_tokens.weight":
        for node in _readers(weight, "Gather"):
            mark(node.outputs[0], ["embedding"])
    elif name == "model.norm.weight":
        for node in _readers(weight, "RMSNormalization"):
            mark(node.outputs[0], ["norm"])
    if not name.startswith("model.layers."):
        return
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    index = int(layer)
    if rest in _NORMS:
        for node in _readers(weight, "RMSNormalization"):
            mark(node.outputs[0], [point_name(index, _NORMS[rest])])
    elif rest in _RESIDUALS:
        for product in _readers(weight, "Mul"):
            for node in _readers(product.outputs[0], "Add"):
                mark(node.outputs[0], [point_name(index, _RESIDUALS[rest])])
    elif rest.removesuffix(".weight") in _LINEARS:
        point = _LINEARS[rest.removesuffix(".weight")]
        for product in _readers(weight, "MatMul"):
            mark(_with_bias(product), [point_name(index, point)])
            x = product.inputs[0]
            if point == "down" and x is not None and x.producer() is not None:
                mark(x, [point_name(index, "activation")])


def _readers(value: ir.Value, op_type: str) -> Iterator[ir.Node]:
    """Nodes of that operator which read a value, or its transpose."""
    for use in list(value.uses()):
        if use.node.op_type == "Transpose" and op_type == "MatMul":
            yield from _readers(use.node.outputs[0], op_type)
        elif use.node.op_type == op_type:
            yield use.node


def _with_bias(product: ir.Node) -> ir.Value:
    """The output of a linear layer."""
    output: ir.Value = product.outputs[0]
    users = [use.node for use in output.uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        others = [value for value in users[0].inputs if value is not output]
        if others and others[0] is not None and others[0].is_initializer():
            return users[0].outputs[0]
    return output


def _mark_attention(node: ir.Node, layer: int) -> None:
    query, key, _, score, *_ = node.inputs
    assert query is not None
    mark(query, [point_name(layer, "rope_q")])
    for value, name in ((_new_part(key), "rope_k"), (_new_part(score), "score")):
        if value is not None and value.producer() is not None:
            mark(value, [point_name(layer, name)])
    for transpose in _readers(node.outputs[0], "Transpose"):
        for merged in _readers(transpose.outputs[0], "Reshape"):
            mark(merged.outputs[0], [point_name(layer, "attention")])


def _new_part(value: ir.Value | None) -> ir.Value | None:
    """Of a cache the part of the new tokens; a value that is no cache is that part itself."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type in ("TensorScatter", "Concat"):
        return node.inputs[1]
    return value


def _mark_experts(node: ir.Node, layer: int) -> None:
    for total in _readers(node.outputs[0], "Add"):
        mark(total.outputs[0], [point_name(layer, "experts")])
