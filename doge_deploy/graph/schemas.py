"""ONNX schemas of the `doge` domain, version 1: the contract of a node, with or without a body.

A runtime takes such a node as a local function (its body is standard ONNX); a plugin takes the same node without it.
"""

from __future__ import annotations

import onnx.defs
import onnx_ir as ir
from onnx.defs import OpSchema

from doge_deploy.errors import UnsupportedModelError

DOMAIN = "doge"
VERSION = 1
DYNAMIC_MASK_ATTENTION = "DynamicMaskAttention"
CDMOE = "CDMoE"
WINDOW_BIAS = "WindowBias"
"""Only in graphs lowered for ONNX Runtime: the selection of DynamicMaskAttention without the attention."""
ROUTED_EXPERTS = "RoutedExperts"
"""Only in graphs lowered for ONNX Runtime: CDMoE, see `doge_deploy.targets.ort.experts_body`."""
ACTIVATION = "Activation"
"""Exists only while a graph is traced: every call is inlined before the graph is handed on."""

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_Parameter = OpSchema.FormalParameter
_Attribute = OpSchema.Attribute
_INT, _FLOAT, _STRING = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT, OpSchema.AttrType.STRING


# Four optional inputs: one variadic is filled with all inputs of the node by torch.onnx's exporter (torch 2.13).
_ACTIVATION_WEIGHTS = [
    _Parameter(f"act_fn_{index}", "W", doc, param_option=OpSchema.FormalParameterOption.Optional)
    for index, doc in enumerate(("[1]: weight of prelu, alpha_p of xielu", "[1]: alpha_n", "[]: beta", "[]: eps"))
]
"""Weights of an activation that has some, in the order of `TRAINED_ACTIVATIONS`."""


def _dynamic_mask_attention() -> OpSchema:
    return OpSchema(
        DYNAMIC_MASK_ATTENTION,
        DOMAIN,
        VERSION,
        doc="softmax(q k^T * scale + bias) v; bias is the key's score, and keys outside the row's best w are hidden.",
        inputs=[
            _Parameter("query", "T", "[B, H, Q, D]; row q of batch b sits at cache slot first_slot[b] + q"),
            _Parameter("key", "T", "[B, Hkv, K, D]"),
            _Parameter("value", "T", "[B, Hkv, K, D]"),
            _Parameter(
                "score",
                "tensor(float)",
                "[B, S, K, 1]: exp(A * softplus(dt_proj(value))); S is Hkv or H",
            ),
            _Parameter("first_slot", "tensor(int64)", "[B]"),
            _Parameter(
                "key_mask",
                "tensor(bool)",
                "[B, K]: false for slots that nobody may see",
                param_option=OpSchema.FormalParameterOption.Optional,
            ),
        ],
        outputs=[_Parameter("output", "T", "[B, H, Q, D]")],
        type_constraints=[("T", _FLOATS, "")],
        attributes=[
            _Attribute("keep_window_size", _INT, "keys kept per row, ties to the lowest index; 0 keeps all"),
            _Attribute("scale", _FLOAT, "multiplies q k^T"),
            _Attribute(
                "sliding_window",
                _INT,
                "a row sees its own slot and the sliding_window - 1 before it; absent: all before it",
                required=False,
            ),
        ],
    )


def _cdmoe() -> OpSchema:
    return OpSchema(
        CDMOE,
        DOMAIN,
        VERSION,
        doc="sum over the k routed experts e of act(h . down_embed[e]) * weight_e * up_embed[e].",
        inputs=[
            _Parameter("hidden", "T", "[B, Q, C]"),
            _Parameter("router_logits", "T", "[B, Q, 2n]"),
            _Parameter("down_embed", "T", "[E, C]"),
            _Parameter("up_embed", "T", "[E, C]"),
            *_ACTIVATION_WEIGHTS,
        ],
        outputs=[_Parameter("output", "T", "[B, Q, C]")],
        type_constraints=[("T", _FLOATS, ""), ("W", _FLOATS, "")],
        attributes=[
            _Attribute("num_experts_per_tok", _INT, "k"),
            _Attribute("norm_topk_prob", _INT, "1: the k weights are divided by their sum"),
            _Attribute("routing", _STRING, '"reference": halves as transformers takes them; "per-token": clean split'),
            _Attribute("activation", _STRING, "name of the activation, as in transformers"),
        ],
    )


def _activation() -> OpSchema:
    return OpSchema(
        ACTIVATION,
        DOMAIN,
        VERSION,
        doc="the activation of the feed-forward layer",
        inputs=[_Parameter("x", "T", "any shape"), *_ACTIVATION_WEIGHTS],
        outputs=[_Parameter("y", "T", "the shape of x")],
        type_constraints=[("T", _FLOATS, ""), ("W", _FLOATS, "")],
    )


def input_names(model: ir.Model, node: ir.Node) -> list[str]:
    """Names of a node's inputs, in order: those of its local function in `model`, or of its schema.

    Raises:
        UnsupportedModelError: it has neither.
    """
    function = model.functions.get(node.op_identifier())
    if function is not None:
        return [str(value.name) for value in function.inputs]
    for schema in _schemas():
        if (schema.domain, schema.name) == (node.domain, node.op_type):
            return [parameter.name for parameter in schema.inputs]
    raise UnsupportedModelError(f"node {node.name}: {node.domain}::{node.op_type} has no local function and no schema")


def _schemas() -> tuple[OpSchema, ...]:
    return _dynamic_mask_attention(), _cdmoe(), _activation()


def register_schemas() -> None:
    """Make the `doge` schemas known to onnx in this process; calling it again does nothing."""
    for schema in _schemas():
        if not onnx.defs.has(schema.name, VERSION, DOMAIN):
            onnx.defs.register_schema(schema)
