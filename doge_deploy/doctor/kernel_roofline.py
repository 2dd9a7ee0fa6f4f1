"""What the plugins should cost beside the standard operators that they replace: calculated, not measured.

The time of a launch is the larger of (bytes over the memory bus) / bandwidth and (operations) / peak, both the maker's
figures. Launches, latency, occupancy and what a small GPU cannot keep in its caches are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from doge_deploy.checkpoint.names import EMBEDDING, HEAD, expected_tensors
from doge_deploy.config.expert_pairs import candidate_pairs
from doge_deploy.config.model import DogeFacts
from doge_deploy.dtypes import item_bytes
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.graph.cost import graph_cost
from doge_deploy.graph.functions import cdmoe_function, dynamic_mask_attention_function
from doge_deploy.graph.functions.text import OPSET
from doge_deploy.graph.schemas import CDMOE, DOMAIN, DYNAMIC_MASK_ATTENTION, VERSION
from doge_deploy.kernels.cost import chain_costs
from doge_deploy.kernels.registry import Registry
from doge_deploy.kernels.spec import Cost

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RooflineDevice:
    """The two figures of a roofline."""

    name: str
    arch: int
    """Compute capability, 87 for 8.7."""
    bandwidth_gb_per_s: float
    fp16_tflops: float
    """Of dense matrix products with sums in float32."""

    def microseconds(self, cost: Cost) -> float:
        return max(cost.memory_bytes / (self.bandwidth_gb_per_s * 1e3), cost.flops / (self.fp16_tflops * 1e6))


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    past: int
    """Tokens that every row holds."""
    new: int = 1
    batch: int = 1
    dtype: str = "float16"
    routing: str = "per-token"

    @property
    def slots(self) -> int:
        """Of the cache: as many as are needed. A larger one costs the standard operators more, plugins empty parts."""
        return self.past + self.new


@dataclass(frozen=True)
class Line:
    """One kernel, or one operator in standard operators, in all layers."""

    operator: str
    lowering: str
    """`plugins` or `standard`."""
    kernel: str
    launches: int
    cost: Cost
    """Of all launches together."""


@dataclass(frozen=True)
class Roofline:
    """Both lowerings of one call, and the rest of the step that they share."""

    machine: RooflineDevice
    facts: DogeFacts
    call: Call
    lines: tuple[Line, ...]
    rest: Cost
    """Weights, each once, and the new entries of the caches."""

    def total(self, lowering: str) -> Cost:
        return sum((line.cost for line in self.lines if line.lowering == lowering), Cost())

    def microseconds(self, lowering: str) -> float:
        """Of the two operators in all layers."""
        return sum(self.machine.microseconds(line.cost) for line in self.lines if line.lowering == lowering)

    @property
    def operator_gain(self) -> float:
        """Time of the standard operators by that of the plugins."""
        return self.microseconds("standard") / self.microseconds("plugins")

    @property
    def step_gain(self) -> float:
        """The same of the whole step."""
        rest = self.machine.microseconds(self.rest)
        return (rest + self.microseconds("standard")) / (rest + self.microseconds("plugins"))


def roofline(facts: DogeFacts, machine: RooflineDevice, call: Call, registry: Registry) -> Roofline:
    """Both lowerings of one call of a static-cache engine.

    Raises:
        UsageError: nothing is asked.
        UnsupportedModelError: an operator has no plugin, or a plugin no cost model.
    """
    if call.past < 0 or call.new < 1 or call.batch < 1:
        raise UsageError(f"past={call.past}, new={call.new}, batch={call.batch}: must be at least 0, 1 and 1")
    nodes: list[tuple[str, dict[str, Any], Shapes, ir.Function]] = [_attention(facts, call)]
    if facts.is_moe:
        nodes.append(_cdmoe(facts, call))
    layers = facts.num_hidden_layers
    lines = []
    for name, attributes, shapes, function in nodes:
        operator = registry.operator(DOMAIN, name)
        if operator is None:
            raise UnsupportedModelError(f"{DOMAIN}::{name} has no plugin")
        for kernel, cost in chain_costs(
            operator, attributes, shapes, dtype=call.dtype, arch=machine.arch, past=call.past
        ):
            lines.append(Line(name, "plugins", kernel, layers, cost * layers))
        cost = _standard(name, attributes, shapes, function, call.dtype)
        lines.append(Line(name, "standard", "standard operators", layers, cost * layers))
    return Roofline(machine, facts, call, tuple(lines), _rest(facts, call))


def _attention(facts: DogeFacts, call: Call) -> tuple[str, dict[str, Any], Shapes, ir.Function]:
    window = facts.keep_window_size if call.slots > facts.keep_window_size else 0
    batch, kv_heads, size = call.batch, facts.num_key_value_heads, facts.head_dim
    shapes = {
        "query": (batch, facts.num_attention_heads, call.new, size),
        "key": (batch, kv_heads, call.slots, size),
        "value": (batch, kv_heads, call.slots, size),
        "score": (batch, facts.num_score_heads, call.slots, 1),
        "first_slot": (batch,),
    }
    function = dynamic_mask_attention_function(facts, has_key_mask=False, keep_window=bool(window), hidden_bias=-6e4)
    return DYNAMIC_MASK_ATTENTION, {"keep_window_size": window, "scale": size**-0.5}, shapes, function


def _cdmoe(facts: DogeFacts, call: Call) -> tuple[str, dict[str, Any], Shapes, ir.Function]:
    k, keys, hidden = facts.num_experts_per_tok, facts.num_keys, facts.hidden_size
    shapes = {
        "hidden": (call.batch, call.new, hidden),
        "router_logits": (call.batch, call.new, 2 * keys),
        "down_embed": (facts.num_experts, hidden),
        "up_embed": (facts.num_experts, hidden),
    }
    attributes = {
        "num_experts_per_tok": k,
        "norm_topk_prob": int(facts.norm_topk_prob),
        "routing": call.routing,
        "activation": facts.hidden_act,
    }
    pairs = candidate_pairs(k, keys)
    return CDMOE, attributes, shapes, cdmoe_function(facts, routing=call.routing, pairs=pairs)


_FIXED_DTYPES = {"score": ir.DataType.FLOAT, "first_slot": ir.DataType.INT64}


def _standard(
    name: str, attributes: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], function: ir.Function, dtype: str
) -> Cost:
    """The operator's body at these sizes."""
    of_model = ir.DataType.FLOAT if dtype == "float32" else ir.DataType.FLOAT16  # bfloat16 is as wide
    inputs = [ir.val(key, _FIXED_DTYPES.get(key, of_model), ir.Shape(shape)) for key, shape in shapes.items()]
    node = ir.node(name, inputs, attributes, domain=DOMAIN, num_outputs=1)
    node.outputs[0].name, node.outputs[0].dtype = "output", of_model
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: VERSION}, name=name)
    model = ir.Model(graph, ir_version=11, functions=[function])
    feeds = {value.name: np.zeros(shapes[str(value.name)], value.dtype.numpy()) for value in inputs if value.dtype}
    return graph_cost(model, feeds)  # type: ignore[arg-type]


def _rest(facts: DogeFacts, call: Call) -> Cost:
    """Every weight that a step reads except the experts, which the operator reads; and the caches' new slots."""
    item = item_bytes(call.dtype)
    tensors = expected_tensors(facts)
    embedding = tensors[EMBEDDING] if HEAD in tensors else ()
    weights = sum(prod(shape) for name, shape in tensors.items() if not name.endswith("_embed.weight"))
    weights -= prod(embedding) if embedding else 0  # a table of its own gives a row or two
    slot = facts.num_key_value_heads * facts.head_dim * 2 * item + facts.num_score_heads * 4
    written = call.batch * call.new * facts.num_hidden_layers * slot
    flops = 2 * weights * call.batch * call.new
    return Cost(weights * item, written, weights * item + written, flops)
