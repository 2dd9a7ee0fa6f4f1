"""Nodes that every kernel is part of, with inputs, and their reference implementations: what `plugins record` records.

Axes: B batch, H query heads, Hkv key/value heads, S score heads, D head_dim, Q new tokens, K cache slots, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from doge_deploy.kernels.samples import Model
from doge_deploy.model.attention import dynamic_mask_attention
from doge_deploy.model.moe import cdmoe

Tensors = Mapping[str, torch.Tensor]

CALLS = (1, 24)
"""New tokens: a step, whose keys are split among programs, and a chunk, whose are not."""

MORE_SLOTS = 80
"""Slots beyond the window, so that keys are dropped."""


@dataclass(frozen=True)
class AttentionNode:
    """doge::DynamicMaskAttention at the sizes of a model; B is 1."""

    model: Model
    window: int
    new: int
    masked: bool
    dtype: str

    operator = "DynamicMaskAttention"

    @property
    def name(self) -> str:
        mask = ", masked" if self.masked else ""
        return f"{self.operator}, {self.new} new tokens, {self._slots} slots, window {self.window or 'none'}{mask}"

    @property
    def _slots(self) -> int:
        return self.window + MORE_SLOTS if self.window else 4 * MORE_SLOTS

    @property
    def past(self) -> int:
        """Tokens that the row holds before the call: its last new token has the last slot but one."""
        return self._slots - self.new - 1

    @property
    def attributes(self) -> dict[str, Any]:
        return {"keep_window_size": self.window, "scale": self.model.head_dim**-0.5}

    def inputs(self, seed: int) -> dict[str, torch.Tensor]:
        """Random; the slot that no row sees holds NaN, as a cache may before it is written."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        model, dtype = self.model, getattr(torch, self.dtype)
        found = {
            "query": normal(1, model.num_attention_heads, self.new, model.head_dim).to(dtype),
            "key": normal(1, model.num_key_value_heads, self._slots, model.head_dim).to(dtype),
            "value": normal(1, model.num_key_value_heads, self._slots, model.head_dim).to(dtype),
            "score": torch.exp(normal(1, model.num_score_heads, self._slots, 1)),
            "first_slot": torch.tensor([self.past]),
        }
        for name in ("key", "value", "score"):
            found[name][:, :, -1] = float("nan")
        if self.masked:
            found["key_mask"] = torch.rand(1, self._slots, generator=generator) > 0.02
            found["key_mask"][:, 0] = True
        return found

    def twin(self, inputs: Tensors, dtype: str) -> torch.Tensor:
        """`[B, H, Q, D]`, computed in `dtype`."""
        finite = {name: t.nan_to_num(0.0) if t.is_floating_point() else t for name, t in inputs.items()}
        typed = [finite[name].to(getattr(torch, dtype)) for name in ("query", "key", "value")]
        mask, scale = finite.get("key_mask"), self.model.head_dim**-0.5
        result: torch.Tensor = dynamic_mask_attention(
            *typed, finite["score"], finite["first_slot"], mask, self.window, scale
        )
        return result


@dataclass(frozen=True)
class ExpertsNode:
    """doge::CDMoE at the sizes of a model; B is 1."""

    model: Model
    new: int
    routing: str
    quantized: bool
    dtype: str

    operator = "CDMoE"
    past = 0

    @property
    def name(self) -> str:
        tables = ", int8 tables" if self.quantized else ""
        return f"{self.operator}, {self.new} new tokens, {self.model.num_experts} experts, {self.routing}{tables}"

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "num_experts_per_tok": self.model.num_experts_per_tok,
            "norm_topk_prob": int(self.model.norm_topk_prob),
            "routing": self.routing,
            "activation": self.model.hidden_act,
        }

    def inputs(self, seed: int) -> dict[str, torch.Tensor]:
        """Random; tables of int8 have a scale a row."""
        generator = torch.Generator().manual_seed(seed)
        model, dtype = self.model, getattr(torch, self.dtype)
        experts, size, keys = model.num_experts, model.hidden_size, int(model.num_experts**0.5)
        found = {
            "hidden": torch.randn(1, self.new, size, generator=generator).to(dtype),
            "router_logits": torch.randn(1, self.new, 2 * keys, generator=generator).to(dtype),
        }
        tables = {
            "down_embed": torch.randn(experts, size, generator=generator) * size**-0.5,
            "up_embed": torch.randn(experts, size, generator=generator),
        }
        if not self.quantized:
            return found | {name: table.to(dtype) for name, table in tables.items()}
        scales = {name: table.abs().amax(1) / 127 for name, table in tables.items()}
        found |= {name: torch.round(table / scales[name][:, None]).to(torch.int8) for name, table in tables.items()}
        return found | {"down_scale": scales["down_embed"], "up_scale": scales["up_embed"]}

    def twin(self, inputs: Tensors, dtype: str) -> torch.Tensor:
        """`[B, Q, C]`, computed in `dtype`."""
        wanted = getattr(torch, dtype)
        tables = [inputs[f"{name}_embed"].to(wanted) for name in ("down", "up")]
        if self.quantized:
            scales = [inputs[f"{name}_scale"][:, None] for name in ("down", "up")]
            tables = [
                (inputs[f"{name}_embed"].double() * scale.double()).to(wanted)
                for name, scale in zip(("down", "up"), scales, strict=True)
            ]
        result: torch.Tensor = cdmoe(
            inputs["hidden"].to(wanted),
            inputs["router_logits"].to(wanted),
            *tables,
            [],
            self.model.num_experts_per_tok,
            self.model.norm_topk_prob,
            self.routing,
            self.model.hidden_act,
        )
        return result


Sample = AttentionNode | ExpertsNode


def samples(model: Model, dtype: str) -> Iterator[Sample]:
    """Nodes in which every kernel of the two operators runs, each in the ways that it has."""
    for new in CALLS:
        for window in (0, model.keep_window_size):
            for masked in (False, True):
                yield AttentionNode(model, window, new, masked, dtype)
        if model.num_experts:
            for routing, quantized in (("reference", False), ("per-token", False), ("reference", True)):
                yield ExpertsNode(model, new, routing, quantized, dtype)
