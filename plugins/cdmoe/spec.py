"""Specs of the kernels of doge::CDMoE, and their chain.

Symbols: B batch, Q new tokens, C hidden, E experts, n = floor(sqrt(E)) keys per half, k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.kernels.expressions import sym
from doge_deploy.kernels.spec import Attribute, DType, Limit, OperatorPlugin, PluginSpec, Step, TensorSpec
from doge_plugins.cdmoe.cost import COSTS
from doge_plugins.cdmoe.tiles import experts_tile, route_tile

B, Q, C, E, WIDTH, TOP = (sym(name) for name in ("B", "Q", "C", "E", "router_width", "k"))
K_ATTRIBUTE = sym("num_experts_per_tok")

ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
    "sqrtsoftplus", "swish", "tanh",
)  # fmt: skip
"""Names of activations, as in transformers: all that have no weights of their own."""

_HIDDEN = TensorSpec("hidden", "T", (B, Q, C))
_IDS = TensorSpec("expert_ids", "int32", (B, Q, TOP), "best first")
_WEIGHTS = TensorSpec("expert_weights", "float32", (B, Q, TOP))

_ROUTE = PluginSpec(
    name="CDMoERoute",
    doc="ids and softmax weights of the k best sums x[i] + y[j] of a token's two halves",
    inputs=(TensorSpec("router_logits", "T", (B, Q, WIDTH), "2n"),),
    outputs=(
        TensorSpec("expert_ids", "int32", (B, Q, K_ATTRIBUTE), _IDS.doc),
        TensorSpec("expert_weights", "float32", (B, Q, K_ATTRIBUTE)),
    ),
    attributes=(
        Attribute("num_experts_per_tok", "int", "k"),
        Attribute("norm_topk_prob", "int", "1: the k weights are divided by their sum", (0, 1)),
        Attribute("routing", "str", "how a token's halves are taken", ("reference", "per-token")),
    ),
    kernel="doge_plugins.cdmoe.kernel:route_kernel",
    scalars={"num_tokens": B * Q},
    constants={
        "TOP": K_ATTRIBUTE,
        "KEYS": WIDTH // 2,
        "NORMALISE": sym("norm_topk_prob"),
        "ROUTING": sym("routing"),
    },
    static=("router_width",),
    grid=(B * Q, 1, 1),
    tiler=route_tile,
    limits=(
        Limit(lambda v: v["router_width"] % 2 == 0 and v["router_width"] <= 2048, "router_width even, at most 2048"),
        Limit(
            lambda v: 1 <= v["num_experts_per_tok"] <= min(128, (v["router_width"] // 2) ** 2),
            "num_experts_per_tok between 1 and the number of reachable experts, at most 128",
        ),
    ),
)


def _experts(quantized: bool) -> PluginSpec:
    table: DType = "int8" if quantized else "T"
    scales = (
        TensorSpec("down_scale", "float32", (E,), "a row of down_embed is this times its int8"),
        TensorSpec("up_scale", "float32", (E,), "a row of up_embed is this times its int8"),
    )
    return PluginSpec(
        name="CDMoEExperts" + ("Int8" if quantized else ""),
        doc="sum over the chosen experts e of act(h . down_embed[e]) * weight_e * up_embed[e]",
        inputs=(
            _HIDDEN,
            _IDS,
            _WEIGHTS,
            TensorSpec("down_embed", table, (E, C)),
            TensorSpec("up_embed", table, (E, C)),
            *(scales if quantized else ()),
        ),
        outputs=(TensorSpec("output", "T", (B, Q, C)),),
        attributes=(Attribute("activation", "str", "name of the activation, as in transformers", ACTIVATIONS),),
        kernel="doge_plugins.cdmoe.kernel:experts_" + ("int8_kernel" if quantized else "kernel"),
        constants={"TOP": TOP, "HIDDEN": C, "ACTIVATION": sym("activation")},
        static=("C", "E", "k"),
        grid=(B * Q, 1, 1),
        tiler=experts_tile,
        limits=(
            Limit(lambda v: v["k"] <= 128, "k at most 128"),
            Limit(lambda v: v["E"] * v["C"] < 2**62, "tables of fewer than 2^62 numbers"),
        ),
    )


SPECS = (_ROUTE, _experts(False), _experts(True))


def chain(attributes: Mapping[str, Any], inputs: frozenset[str]) -> tuple[Step, ...]:
    """The nodes that compute one CDMoE node.

    Args:
        attributes: of the CDMoE node.
        inputs: names of its inputs; with `down_scale` and `up_scale` the tables are int8.

    Raises:
        UnsupportedModelError: the activation has weights of its own (inputs `act_fn_0`, ...), or is not known here.
    """
    activation = attributes["activation"]
    if activation not in ACTIVATIONS or any(name.startswith("act_fn") for name in inputs):
        raise UnsupportedModelError(
            f"activation={activation!r}: CDMoE's kernels take {', '.join(ACTIVATIONS)}; keep the operator's standard "
            "body"
        )
    routing = {name: attributes[name] for name in ("num_experts_per_tok", "norm_topk_prob", "routing")}
    quantized = "down_scale" in inputs
    scales = ("down_scale", "up_scale") if quantized else ()
    tables = ("down_embed", "up_embed", *scales)
    chosen = ("expert_ids", "expert_weights")
    return (
        Step(_ROUTE, ("router_logits",), chosen, routing),
        Step(
            SPECS[2 if quantized else 1],
            ("hidden", *chosen, *tables),
            ("output",),
            {"activation": activation},
        ),
    )


PLUGIN = OperatorPlugin("CDMoE", SPECS, chain, costs=COSTS)
