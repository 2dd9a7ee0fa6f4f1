"""Body of doge::CDMoE.

    ids, weights = the k best sums x[i] + y[j] of the token's two halves, and their softmax
    output = sum over those experts e of act(h . down_embed[e]) * weight_e * up_embed[e]

With both halves sorted, only pairs of ranks (i, j) with (i+1)*(j+1) <= k can be among the k best: those are formed,
never n*n sums. Reference implementation: `doge_deploy.model.moe.cdmoe`.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from doge_deploy.config.model import DogeFacts
from doge_deploy.graph.functions.activations import activation_body, weight_inputs
from doge_deploy.graph.functions.text import parse_function
from doge_deploy.graph.schemas import CDMOE

EXPERTS = "experts"
"""Name of the value that holds the chosen expert ids, `[N, k]` int64; verification looks at it."""

_HALVES = {
    # transformers re-interprets the memory of [B, Q, 2n]: with N > 1 a token's halves come from other tokens.
    "reference": """
    halves_shape = Constant <value_ints = [2, -1, KEYS]> ()
    halves = Reshape (router_logits, halves_shape)
""",
    "per-token": """
    halves_shape = Constant <value_ints = [-1, 2, KEYS]> ()
    token_halves = Reshape (router_logits, halves_shape)
    halves = Transpose <perm = [1, 0, 2]> (token_halves)
""",
}

_ROUTE = """
    first = Constant <value_int = 0> ()
    second = Constant <value_int = 1> ()
    half_x = Gather <axis = 0> (halves, first)
    half_y = Gather <axis = 0> (halves, second)
    reach = Constant <value_ints = [REACH]> ()
    score_x, key_x = TopK <axis = -1, largest = 1, sorted = 1> (half_x, reach)
    score_y, key_y = TopK <axis = -1, largest = 1, sorted = 1> (half_y, reach)
    rank_x = Constant <value_ints = [RANK_X]> ()
    rank_y = Constant <value_ints = [RANK_Y]> ()
    pair_score_x = Gather <axis = 1> (score_x, rank_x)
    pair_score_y = Gather <axis = 1> (score_y, rank_y)
    pair_score = Add (pair_score_x, pair_score_y)
    k_scalar = Constant <value_int: int = @num_experts_per_tok> ()
    first_axis = Constant <value_ints = [0]> ()
    k = Unsqueeze (k_scalar, first_axis)
    best_score, best_pair = TopK <axis = -1, largest = 1, sorted = 1> (pair_score, k)
    pair_key_x = Gather <axis = 1> (key_x, rank_x)
    pair_key_y = Gather <axis = 1> (key_y, rank_y)
    num_keys = Constant <value_int = KEYS> ()
    pair_row = Mul (pair_key_x, num_keys)
    pair_expert = Add (pair_row, pair_key_y)
    experts = GatherElements <axis = 1> (pair_expert, best_pair)
    softmax = Softmax <axis = -1> (best_score)
"""

_NORMALISE = """
    last_axis = Constant <value_ints = [-1]> ()
    total = ReduceSum <keepdims = 1> (softmax, last_axis)
    weight = Div (softmax, total)
"""

_EXPERTS_IN = """
    tokens_shape = Constant <value_ints = [-1, HIDDEN, 1]> ()
    tokens = Reshape (hidden, tokens_shape)
    down_rows = Gather <axis = 0> (down_embed, experts)
    dots = MatMul (down_rows, tokens)
    dot_axis = Constant <value_ints = [2]> ()
    dot = Squeeze (dots, dot_axis)
"""

_EXPERTS_OUT = """
    gate = Mul (activated, weight)
    gate_axis = Constant <value_ints = [1]> ()
    gate_row = Unsqueeze (gate, gate_axis)
    up_rows = Gather <axis = 0> (up_embed, experts)
    mixed = MatMul (gate_row, up_rows)
    output_shape = Shape (hidden)
    output = Reshape (mixed, output_shape)
"""


def cdmoe_function(facts: DogeFacts, *, routing: str, pairs: Sequence[tuple[int, int]]) -> ir.Function:
    """The local function for one graph.

    Args:
        facts: experts, keys and activation of the checkpoint.
        routing: "reference" or "per-token".
        pairs: the candidate ranks, see `doge_deploy.config.expert_pairs.candidate_pairs`.

    Raises:
        UnsupportedModelError: the activation has no body in standard operators.
    """
    body = _HALVES[routing] + _ROUTE
    body += _NORMALISE if facts.norm_topk_prob else "    weight = Identity (softmax)\n"
    body += _EXPERTS_IN + activation_body(facts.hidden_act, "dot", "activated") + _EXPERTS_OUT
    numbers = {
        "KEYS": str(facts.num_keys),
        "REACH": str(max(i for i, _ in pairs) + 1),
        "RANK_X": ", ".join(str(i) for i, _ in pairs),
        "RANK_Y": ", ".join(str(j) for _, j in pairs),
        "HIDDEN": str(facts.hidden_size),
    }
    for name, number in numbers.items():
        body = body.replace(name, number)
    return parse_function(
        CDMOE,
        ["hidden", "router_logits", "down_embed", "up_embed", *weight_inputs(facts.hidden_act)],
        ["output"],
        ["num_experts_per_tok", "norm_topk_prob", "routing", "activation"],
        body,
    )
