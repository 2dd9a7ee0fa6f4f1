"""Each stage of a Doge alone: transformers' own layers, called one by one on whatever input is given.

A stage is run in the dtype of the bundle and in the next wider one, on the same numbers; the difference is what noise
explains of that stage. tests/verify/localize/test_oracle.py compares the chain of them with transformers.

Axes: B rows, Q tokens of a call, K columns of the cache, H query heads, Hkv key/value heads, S heads of the score,
D head_dim, C hidden, N = B*Q, n router keys, k experts. States are `[B, Q, heads*D]`, heads side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.doge.modeling_doge import apply_rotary_pos_emb

from doge_deploy.config.model import DogeFacts
from doge_deploy.graph.stages import LAYER_POINTS
from doge_deploy.verify.compare import Array
from doge_deploy.verify.localize.calls import CallView
from doge_deploy.verify.reference import Reference

Values = dict[str, torch.Tensor]
"""By name of a point of the layer, and `x`, the state that the layer gets."""


@dataclass(frozen=True)
class Cache:
    """What one layer holds before a call: `key` and `value` `[B, Hkv, P, D]`, `score` `[B, S, P]`.

    Static: P slots, all that the case needs, of which a row uses the first ones. Otherwise P grows.
    """

    key: torch.Tensor
    value: torch.Tensor
    score: torch.Tensor

    def to(self, dtype: torch.dtype) -> Cache:
        return Cache(self.key.to(dtype), self.value.to(dtype), self.score.to(dtype))


@dataclass(frozen=True)
class Context:
    """A call in a layer: all that a stage reads beside other stages."""

    view: CallView
    rotation: tuple[torch.Tensor, torch.Tensor]
    """cos and sin, `[B, Q, D]`."""
    cache: Cache
    static: bool
    window: int
    """keep_window_size where keys can be dropped; 0: all are kept."""
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """`selection` `[B, S, Q, K]` bool and `expert_selection` `[N, k]` that take the place of the reference's own."""

    def joined(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """A cache with the new part `[B, heads, Q, ...]`, its first K columns."""
        if not self.static:
            return torch.cat((past, new), dim=2)
        whole = past.clone()
        for b, first in enumerate(self.view.first.tolist()):
            whole[b, :, first : first + new.shape[2]] = new[b]
        return whole[:, :, : self.view.columns]

    def advanced(self, values: Values, facts: DogeFacts) -> Cache:
        """What the layer holds after the call."""
        key = _heads(values["rope_k"], facts.head_dim)
        value = _heads(values["v"], facts.head_dim)
        score = values["score"].transpose(1, 2)
        if not self.static:
            return Cache(self.joined(self.cache.key, key), self.joined(self.cache.value, value), score)
        grown = Cache(self.cache.key.clone(), self.cache.value.clone(), self.cache.score.clone())
        for target, new in ((grown.key, key), (grown.value, value), (grown.score, score)):
            for b, first in enumerate(self.view.first.tolist()):
                target[b, :, first : first + new.shape[2]] = new[b]
        return grown


def _heads(x: torch.Tensor, size: int) -> torch.Tensor:
    """`[B, Q, heads*D]` -> `[B, heads, Q, D]`."""
    return x.reshape(*x.shape[:2], -1, size).transpose(1, 2)


class Stages:
    """The stages of one reference.

    Args:
        reference: transformers' model with the weights that the bundle stores.
        routing: "reference" or "per-token".
    """

    def __init__(self, reference: Reference, routing: str) -> None:
        self.reference = reference
        self.facts = reference.facts
        self.routing = routing
        self.body = reference.body
        self.dtype: torch.dtype = next(reference.body.parameters()).dtype

    def points(self, layer: int) -> Sequence[str]:
        """Names of the points of a layer that this model has, in order."""
        attention, absent = self.body.layers[layer].self_attn, set()
        if not hasattr(attention, "q_norm"):
            absent |= {"q_norm", "k_norm"}
        if not self.facts.is_moe:
            absent |= {"router", "expert_selection", "experts"}
        return [name for name in LAYER_POINTS if name not in absent]

    @torch.no_grad()
    def rotations(self, views: Sequence[CallView]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin of every call; the RoPE types with a memory have to see all calls in order."""
        self.reference.forget()
        x = torch.empty(0, dtype=self.dtype)
        return [self.body.rotary_emb(x, torch.from_numpy(np.ascontiguousarray(view.positions))) for view in views]

    @torch.no_grad()
    def embedding(self, view: CallView) -> torch.Tensor:
        """`[B, Q, C]`."""
        embedded: torch.Tensor = self.body.embed_tokens(torch.from_numpy(np.ascontiguousarray(view.ids)))
        return embedded

    @torch.no_grad()
    def norm(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.body.norm(x)
        return normed

    @torch.no_grad()
    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """`[B, Q, V]`, or class logits of every token."""
        model = self.reference.model
        head = model.score if self.reference.task == "sequence-classification" else model.lm_head
        logits: torch.Tensor = head(normed)
        return logits

    def empty_cache(self, batch: int, columns: int) -> Cache:
        facts = self.facts
        pair = torch.zeros(batch, facts.num_key_value_heads, columns, facts.head_dim, dtype=self.dtype)
        return Cache(pair, pair.clone(), torch.zeros(batch, facts.num_score_heads, columns, dtype=self.dtype))

    @torch.no_grad()
    def layer(self, index: int, x: torch.Tensor, context: Context) -> Values:
        """All stages of a layer, each on what the one before it gave."""
        values: Values = {"x": x}
        for name in self.points(index):
            values[name] = self.stage(index, name, values, context)
        return values

    @torch.no_grad()
    def stage(self, index: int, name: str, values: Values, context: Context) -> torch.Tensor:
        """One stage on given input."""
        result: torch.Tensor
        layer = self.body.layers[index]
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        facts, size = self.facts, self.facts.head_dim
        match name:
            case "input_norm":
                result = layer.input_layernorm(values["x"])
            case "q" | "k" | "v":
                result = getattr(attention, f"{name}_proj")(values["input_norm"])
            case "q_norm" | "k_norm":
                heads = values[name[0]].reshape(*values[name[0]].shape[:2], -1, size)
                result = getattr(attention, name)(heads).flatten(-2)
            case "rope_q" | "rope_k":
                source = values.get(f"{name[-1]}_norm", values[name[-1]])
                heads = _heads(source, size)
                result = apply_rotary_pos_emb(heads, heads, *context.rotation)[0].transpose(1, 2).flatten(2)
            case "score":
                result = self._score(attention, values["v"], context)
            case "selection":
                result = context.given["selection"] if name in context.given else self._kept(values, context)
            case "attention":
                result = self._attention(values, context)
            case "o_proj":
                result = attention.o_proj(values["attention"])
            case "residual":
                result = layer.input_residual * values["x"] + values["o_proj"]
            case "post_norm":
                result = layer.post_attention_layernorm(values["residual"])
            case "gate" | "up":
                result = getattr(mlp, f"{name}_proj")(values["post_norm"])
            case "activation":
                result = mlp.act_fn(values["gate"]) * values["up"]
            case "down":
                result = mlp.down_proj(values["activation"])
            case "router":
                result = mlp.router_gate(values["post_norm"])
            case "expert_selection":
                own = name not in context.given
                result = best_experts(*self.halves(values["router"]), mlp.top_k) if own else context.given[name]
            case "experts":
                result = values["down"] + self._routed(mlp, values)
            case "mlp_residual":
                fed = values["experts" if facts.is_moe else "down"]
                result = layer.post_attention_residual * values["residual"] + fed
            case _:
                raise ValueError(f"{name} is no point of a layer")
        return result

    def _score(self, attention: Any, v: torch.Tensor, context: Context) -> torch.Tensor:
        """`[B, Q, S]` of the new tokens in a static cache, `[B, K, S]` of all keys in another."""
        if not context.static:
            whole = context.joined(context.cache.value, _heads(v, self.facts.head_dim))
            v = whole.transpose(1, 2).flatten(2)
        return torch.exp(attention.A * F.softplus(attention.dt_proj(v)))

    def scores(self, values: Values, context: Context) -> torch.Tensor:
        """`[B, S, K]` of all keys, as the selection ranks them."""
        score = values["score"].transpose(1, 2)
        return context.joined(context.cache.score, score) if context.static else score

    def _kept(self, values: Values, context: Context) -> torch.Tensor:
        visible = torch.from_numpy(context.view.visible)[:, None]
        scores = self.scores(values, context)
        if not context.window:
            return visible.expand(-1, scores.shape[1], -1, -1)
        return best_keys(scores, visible, context.window)

    def _attention(self, values: Values, context: Context) -> torch.Tensor:
        """Eager attention over the selected keys, as transformers computes it; the softmax of the widest kind is in
        float64, where transformers' is in float32: it must not make the noise that it measures.
        """
        size, heads = self.facts.head_dim, self.facts.num_attention_heads
        query = _heads(values["rope_q"], size)
        key, value = (
            context.joined(past, _heads(values[name], size))
            for past, name in ((context.cache.key, "rope_k"), (context.cache.value, "v"))
        )
        lowest = torch.finfo(torch.float32 if self.dtype == torch.float64 else self.dtype).min
        bias = self.scores(values, context)[:, :, None].masked_fill(~values["selection"], lowest)
        key, value, bias = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value, bias))
        logits = torch.matmul(query, key.transpose(2, 3)) * size**-0.5 + bias
        precision = torch.float64 if self.dtype == torch.float64 else torch.float32
        weights = torch.softmax(logits, dim=-1, dtype=precision).to(self.dtype)
        return torch.matmul(weights, value).transpose(1, 2).flatten(2)

    def halves(self, router: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of router logits `[B, Q, 2n]` both halves of every token, `[N, n]`."""
        if self.routing == "per-token":
            first, second = router.flatten(0, 1).chunk(2, dim=-1)
        else:  # transformers takes the halves from memory, which mixes tokens
            first, second = router.contiguous().view(2, router.shape[0] * router.shape[1], -1)
        return first, second

    def sums(self, router: torch.Tensor) -> torch.Tensor:
        """Of router logits `[B, Q, 2n]` the score of every expert, `[N, n*n]` in the order of ids."""
        first, second = self.halves(router)
        return (first[:, :, None] + second[:, None, :]).flatten(1)

    def _routed(self, mlp: Any, values: Values) -> torch.Tensor:
        hidden, ids = values["post_norm"], values["expert_selection"]
        weights = F.softmax(self.sums(values["router"]).gather(1, ids), dim=-1)
        if mlp.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        tokens = hidden.flatten(0, 1)
        dots = torch.matmul(mlp.down_embed(ids), tokens[:, :, None]).squeeze(-1)
        gates = mlp.act_fn(dots) * weights
        return torch.matmul(gates[:, None], mlp.up_embed(ids)).view(hidden.shape)


def best_keys(scores: torch.Tensor, visible: torch.Tensor, window: int) -> torch.Tensor:
    """`[B, S, Q, K]`: of the `visible` `[B, 1, Q, K]` keys the `window` best by `scores` `[B, S, K]`; of equals the
    first, as the graphs promise.
    """
    ranked = torch.where(visible, scores[:, :, None].float(), -torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :window]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, True) & visible


def best_experts(first: torch.Tensor, second: torch.Tensor, count: int) -> torch.Tensor:
    """`[N, k]`: ids of the best sums of two halves `[N, n]`; of equals those of the best ranks, as the graphs promise:
    the halves are sorted before, the first of equals first.
    """
    one = torch.sort(first, dim=1, descending=True, stable=True)
    two = torch.sort(second, dim=1, descending=True, stable=True)
    ids = (one.indices[:, :, None] * second.shape[1] + two.indices[:, None, :]).flatten(1)
    sums = (one.values[:, :, None] + two.values[:, None, :]).flatten(1)
    order = torch.sort(sums, dim=1, descending=True, stable=True).indices[:, :count]
    return ids.gather(1, order)


def to_array(tensor: torch.Tensor) -> Array:
    """NumPy has no bfloat16: that is widened, exactly."""
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
