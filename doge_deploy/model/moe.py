"""CDMoE: product-key routing to one-row experts, beside a shared gated MLP.

Axes: B batch, Q new tokens, N = B*Q tokens of the call, C hidden, E experts, n = floor(sqrt(E)) keys per half,
k experts per token.
Reference: `DogeCDMoE` in transformers' modeling_doge.py; https://arxiv.org/abs/2412.11834 (cross domain mixture of
experts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from doge_deploy.config.expert_pairs import candidate_pairs
from doge_deploy.config.keys import TRAINED_ACTIVATIONS
from doge_deploy.config.model import DogeFacts
from doge_deploy.model.ops import activate, activation


def split_router(router_logits: torch.Tensor, routing: str) -> torch.Tensor:
    """`[B, Q, 2n]` -> `[2, N, n]`, the x and y half of every token.

    "reference" re-interprets the memory as transformers does, which mixes tokens as soon as N > 1;
    "per-token" gives each token its own two halves. They agree at N = 1.
    """
    n = router_logits.shape[-1] // 2
    if routing == "reference":
        return router_logits.reshape(2, -1, n)
    return router_logits.reshape(-1, 2, n).transpose(0, 1)


def route(halves: torch.Tensor, k: int, norm_topk_prob: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` best experts of every token: ids `[N, k]` int64 and weights `[N, k]`, from halves `[2, N, n]`.

    Ties go to the lowest key, then to the lowest pair of ranks.
    """
    n = halves.shape[-1]
    order = torch.sort(halves, dim=-1, descending=True, stable=True)
    rank_x, rank_y = torch.tensor(candidate_pairs(k, n), device=halves.device).unbind(1)
    sums = order.values[0][:, rank_x] + order.values[1][:, rank_y]
    ids = order.indices[0][:, rank_x] * n + order.indices[1][:, rank_y]
    best = torch.sort(sums, dim=-1, descending=True, stable=True)
    weights = torch.softmax(best.values[:, :k], dim=-1)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.gather(-1, best.indices[:, :k]), weights


@torch.library.custom_op("doge::cdmoe", mutates_args=())
def cdmoe(
    hidden: torch.Tensor,
    router_logits: torch.Tensor,
    down_embed: torch.Tensor,
    up_embed: torch.Tensor,
    act_fn: Sequence[torch.Tensor],
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routing: str,
    hidden_act: str,
) -> torch.Tensor:
    """The routed part of the layer: sum over the k experts e of act(h . down_embed[e]) * weight_e * up_embed[e].

    Args:
        hidden: `[B, Q, C]`.
        router_logits: `[B, Q, 2n]`.
        down_embed, up_embed: `[E, C]`.
        act_fn: weights of the activation, see `activate`.
        routing: "reference" or "per-token", see `split_router`.
        hidden_act: name of the activation, as in transformers.

    Returns:
        `[B, Q, C]` in the dtype of `hidden`.
    """
    tokens = hidden.flatten(0, 1)
    ids, weights = route(split_router(router_logits, routing), num_experts_per_tok, norm_topk_prob)
    dots = torch.matmul(down_embed[ids], tokens[:, :, None]).squeeze(-1)
    gates = activate(dots, hidden_act, act_fn) * weights
    return torch.matmul(gates[:, None, :], up_embed[ids]).reshape(hidden.shape)


@cdmoe.register_fake
def _(hidden: torch.Tensor, *_others: object) -> torch.Tensor:
    return torch.empty_like(hidden)


class ActivationWeights(nn.Module):
    """The weights that an activation has of its own, named as in transformers' module."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        # XIELUActivation is made in bfloat16 and loaded so, whatever the dtype of the model and of the file
        dtype = torch.bfloat16 if name == "xielu" else dtype
        for weight, shape in TRAINED_ACTIVATIONS.get(name, {}).items():
            self.register_parameter(weight, nn.Parameter(torch.empty(shape, dtype=dtype)))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), plus the routed experts where the model is a mixture."""

    def __init__(self, facts: DogeFacts, routing: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.facts = facts
        self.routing = routing
        hidden, inner, bias = facts.hidden_size, facts.intermediate_size, facts.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=bias, dtype=dtype)
        self.act_fn = ActivationWeights(facts.hidden_act, dtype)
        if facts.is_moe:
            self.router_gate = nn.Linear(hidden, 2 * facts.num_keys, bias=False, dtype=dtype)
            self.down_embed = nn.Embedding(facts.num_experts, hidden, dtype=dtype)
            self.up_embed = nn.Embedding(facts.num_experts, hidden, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = list(self.act_fn.parameters())
        gate = activation(self.gate_proj(x), weights, self.facts.hidden_act)
        shared: torch.Tensor = self.down_proj(gate * self.up_proj(x))
        if not self.facts.is_moe:
            return shared
        routed: torch.Tensor = cdmoe(
            x,
            self.router_gate(x),
            self.down_embed.weight,
            self.up_embed.weight,
            weights,
            self.facts.num_experts_per_tok,
            self.facts.norm_topk_prob,
            self.routing,
            self.facts.hidden_act,
        )
        return shared + routed
