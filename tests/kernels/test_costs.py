"""Cost models against what the interpreter really loads and stores.

Where a number does not depend on the data the two must be equal. Elsewhere the model is an upper bound, and must be
close to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from interpreter_meter import metered

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.kernels.cost import chain_costs
from doge_deploy.kernels.launch import INTERPRETER_ARCH, run_kernel
from doge_deploy.kernels.registry import installed
from doge_deploy.kernels.spec import Cost, OperatorPlugin

ATTENTION = installed().operators["doge", "DynamicMaskAttention"]
MOE = installed().operators["doge", "CDMoE"]

BOUNDS = {"DynamicMaskSelect", "DynamicMaskSplitSelected", "DynamicMaskAttendSelected", "CDMoEExperts"}
"""Kernels of which some number depends on the data where there are several tokens."""


@dataclass(frozen=True)
class Node:
    operator: OperatorPlugin
    attributes: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    past: int


def attention(Q: int, past: int, window: int, *, sliding: int = 0, dtype: str = "float16", batch: int = 2) -> Node:
    generator = torch.Generator().manual_seed(Q + past)
    kind, slots = getattr(torch, dtype), past + Q
    tensors = {
        "query": torch.randn(batch, 4, Q, 32, generator=generator).to(kind),
        "key": torch.randn(batch, 2, slots, 32, generator=generator).to(kind),
        "value": torch.randn(batch, 2, slots, 32, generator=generator).to(kind),
        "score": torch.rand(batch, 2, slots, 1, generator=generator),
        "first_slot": torch.full((batch,), past),
    }
    attributes = {"keep_window_size": window, "scale": 0.2, "sliding_window": sliding}
    return Node(ATTENTION, attributes, tensors, past)


def moe(tokens: int, *, int8: bool = False, dtype: str = "float16") -> Node:
    generator = torch.Generator().manual_seed(tokens)
    kind = getattr(torch, dtype)
    tensors = {
        "hidden": torch.randn(1, tokens, 48, generator=generator).to(kind),
        "router_logits": torch.randn(1, tokens, 16, generator=generator).to(kind),
        "down_embed": torch.randn(64, 48, generator=generator).to(kind),
        "up_embed": torch.randn(64, 48, generator=generator).to(kind),
    }
    if int8:
        for name in ("down", "up"):
            tensors[f"{name}_embed"] = torch.randint(-127, 127, (64, 48), generator=generator, dtype=torch.int8)
            tensors[f"{name}_scale"] = torch.rand(64, generator=generator)
    attributes = {"num_experts_per_tok": 4, "norm_topk_prob": 0, "routing": "reference", "activation": "silu"}
    return Node(MOE, attributes, tensors, 0)


def compare(node: Node) -> Iterator[tuple[str, Cost, Cost]]:
    """(kernel, on paper, found) of every launch."""
    dtype = str(next(iter(node.tensors.values())).dtype).removeprefix("torch.")
    shapes = {name: tuple(tensor.shape) for name, tensor in node.tensors.items()}
    paper = chain_costs(node.operator, node.attributes, shapes, dtype=dtype, arch=INTERPRETER_ARCH, past=node.past)
    values = dict(node.tensors)
    steps = node.operator.chain(node.attributes, frozenset(values))
    for step, (name, expected) in zip(steps, paper, strict=True):
        with metered() as meter:
            outputs = run_kernel(step.spec, [values[name] for name in step.inputs], step.attributes)
        values.update(zip(step.outputs, outputs, strict=True))
        yield name, expected, Cost(meter.loaded_bytes, meter.stored_bytes, meter.memory_bytes, expected.flops)


ONE_TOKEN = {
    "w0-past40": attention(1, 40, 0),
    "w64-past40": attention(1, 40, 64),
    "w16-past200": attention(1, 200, 16),
    "w16-past300-float32": attention(1, 300, 16, dtype="float32"),
    "moe": moe(1),
    "moe-int8": moe(1, int8=True),
}


@pytest.mark.parametrize("node", ONE_TOKEN.values(), ids=ONE_TOKEN)
def test_one_token_is_exact(node: Node) -> None:
    for name, paper, found in compare(node):
        assert paper == found, name


SEVERAL_TOKENS = {
    "w0-Q5-past40": attention(5, 40, 0),
    "w16-Q70-past0": attention(70, 0, 16),
    "w16-Q5-past100": attention(5, 100, 16),
    "w0-Q9-past40-sliding20": attention(9, 40, 0, sliding=20),
    "w0-Q2-past300-sliding200": attention(2, 300, 0, sliding=200),
    "moe-Q7": moe(7),
}


@pytest.mark.parametrize("node", SEVERAL_TOKENS.values(), ids=SEVERAL_TOKENS)
def test_several_tokens_are_exact_or_bounded(node: Node) -> None:
    for name, paper, found in compare(node):
        if name in BOUNDS:
            assert_bound(name, paper, found)
        else:
            assert paper == found, name


def assert_bound(name: str, paper: Cost, found: Cost) -> None:
    for field in ("loaded_bytes", "stored_bytes", "memory_bytes"):
        most, real = getattr(paper, field), getattr(found, field)
        assert 0.4 * most <= real <= most, f"{name}: {field} is {real}, on paper {most}"


def test_a_kernel_without_a_model_is_named() -> None:
    node = attention(1, 40, 0)
    shapes = {name: tuple(tensor.shape) for name, tensor in node.tensors.items()} | {"key_mask": (2, 41)}
    with pytest.raises(UnsupportedModelError, match="plugin doge::DynamicMaskSplitMasked has no cost model"):
        chain_costs(ATTENTION, node.attributes, shapes, dtype="float16", arch=87, past=40)
