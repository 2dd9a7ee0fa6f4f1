"""Nodes that stand for a model: what `plugins compile` compiles.

Only static sizes and attributes are compiled into a kernel; the dynamic ones (batch, tokens, slots) are any legal
number here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from doge_deploy.config.model import DogeFacts
from doge_deploy.errors import UsageError
from doge_deploy.kernels.expressions import evaluate
from doge_deploy.kernels.registry import Registry
from doge_deploy.kernels.spec import Binding, OperatorPlugin, Step

DYNAMIC: Mapping[str, int] = {"B": 1, "Q": 64, "K": 8192, "W": 2048, "P": 16}

PUBLISHED_WINDOW = 2048


@dataclass(frozen=True)
class Model:
    """Sizes that kernels are compiled for."""

    num_attention_heads: int
    num_key_value_heads: int
    num_score_heads: int
    head_dim: int
    keep_window_size: int
    hidden_size: int = 0
    num_experts: int = 0
    """0 for a dense model."""
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False
    hidden_act: str = "silu"

    @classmethod
    def of(cls, facts: DogeFacts) -> Model:
        """The sizes of a checkpoint."""
        return cls(
            facts.num_attention_heads,
            facts.num_key_value_heads,
            facts.num_score_heads,
            facts.head_dim,
            facts.keep_window_size,
            facts.hidden_size,
            facts.num_experts if facts.is_moe else 0,
            facts.num_experts_per_tok,
            facts.norm_topk_prob,
            facts.hidden_act,
        )


def published(head_dim: int) -> Model:
    """Heads and window of the published models with another head size, and the experts of 20M-MoE: 1024, 16 a token.

    Reference: https://github.com/SmallDoges/small-doge, recipes (2 query heads a key/value head; D is 128 there).
    """
    return Model(2, 1, 1, head_dim, PUBLISHED_WINDOW, 256, 1024, 16)


def bindings(registry: Registry, model: Model, dtype: str, names: frozenset[str] = frozenset()) -> Iterator[Binding]:
    """Every kernel that a chain of `model` can hold, once: with and without window and mask.

    Args:
        registry: the plugins.
        model: the sizes.
        dtype: of T.
        names: kernels to be named `DynamicMaskSelect`; all where empty.

    Raises:
        UsageError: no kernel is of that name, or a kernel does not take the model.
    """
    known = {spec.name for spec in registry.specs()}
    for name in sorted(names - known):
        raise UsageError(f"kernel={name!r}: must be one of {', '.join(sorted(known))}")
    done: set[str] = set()
    for operator in registry.operators.values():
        for step in _steps(operator, model):
            key = f"{step.spec.id} {sorted(step.attributes.items())}"
            if key in done or (names and step.spec.name not in names):
                continue
            done.add(key)
            yield _bind(step, model, dtype)


def _steps(operator: OperatorPlugin, model: Model) -> Iterator[Step]:
    attributes: dict[str, Any]
    if operator.operator == "DynamicMaskAttention":
        for window in (0, model.keep_window_size):
            for mask in ((), ("key_mask",)):
                attributes = {"keep_window_size": window, "scale": model.head_dim**-0.5}
                inputs = frozenset(("query", "key", "value", "score", "first_slot", *mask))
                yield from operator.chain(attributes, inputs)
    elif operator.operator == "CDMoE" and model.num_experts:
        for routing in ("reference", "per-token"):
            for scales in ((), ("down_scale", "up_scale")):
                attributes = {
                    "num_experts_per_tok": model.num_experts_per_tok,
                    "norm_topk_prob": int(model.norm_topk_prob),
                    "routing": routing,
                    "activation": model.hidden_act,
                }
                inputs = frozenset(("hidden", "router_logits", "down_embed", "up_embed", *scales))
                yield from operator.chain(attributes, inputs)


def _bind(step: Step, model: Model, dtype: str) -> Binding:
    keys = int(model.num_experts**0.5)
    values = {
        **DYNAMIC,
        "H": model.num_attention_heads,
        "Hkv": model.num_key_value_heads,
        "S": model.num_score_heads,
        "D": model.head_dim,
        "C": model.hidden_size,
        "E": model.num_experts,
        "k": model.num_experts_per_tok,
        "router_width": 2 * keys,
        **step.attributes,
    }
    try:
        shapes = [tuple(evaluate(size, values) for size in tensor.shape) for tensor in step.spec.inputs]
    except KeyError as error:
        raise UsageError(f"{step.spec.id}: no size is known for its dimension {error}") from None
    return step.spec.bind(shapes, step.attributes, dtype)
