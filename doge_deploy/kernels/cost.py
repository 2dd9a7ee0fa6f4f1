"""What a kernel moves and calculates, on paper: bytes and floating-point operations of one launch.

A plugin brings a cost model for each of its kernels; tests hold the bytes against what Triton's interpreter loads
and stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from doge_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    from doge_deploy.kernels.spec import Binding, OperatorPlugin, Tile


@dataclass(frozen=True)
class Cost:
    """Of one launch, or of several together."""

    loaded_bytes: int = 0
    """By all programs; what two of them load counts twice."""
    stored_bytes: int = 0
    memory_bytes: int = 0
    """Each byte that is read or written, once: what has to cross the memory bus however good the caches are."""
    flops: int = 0
    """Floating-point operations of products and sums; comparisons and exponentials are not counted."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, field.name) * times for field in fields(self)))


CostModel = Callable[["Binding", "Tile", int], Cost]
"""(node, tile, past) -> cost of its launch, where every row of the batch holds `past` tokens before the call.

What depends on the data (how many keys a block of rows keeps together) is taken at its upper bound.
"""


def chain_costs(
    operator: OperatorPlugin,
    attributes: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str,
    arch: int,
    past: int,
) -> list[tuple[str, Cost]]:
    """(kernel, cost) of every launch of an operator's chain, in order.

    Args:
        operator: the plugin.
        attributes, shapes: of the operator's node; shapes by the names of its inputs.
        dtype: of T.
        arch: compute capability such as 87, which decides the tiles.
        past: tokens that every row of the batch holds before the call.

    Raises:
        UnsupportedModelError: a kernel has no cost model.
    """
    known = dict(shapes)
    costs = []
    for step in operator.chain(attributes, frozenset(shapes)):
        model = operator.costs.get(step.spec.name)
        if model is None:
            raise UnsupportedModelError(f"plugin {step.spec.id} has no cost model")
        binding = step.spec.bind([known[name] for name in step.inputs], step.attributes, dtype)
        costs.append((step.spec.name, model(binding, binding.tile(arch), past)))
        known.update(zip(step.outputs, binding.output_shapes, strict=True))
    return costs
