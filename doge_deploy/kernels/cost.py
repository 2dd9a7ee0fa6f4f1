"""What a kernel moves and calculates, by calculation: bytes and floating-point operations of one launch.

A plugin brings a cost model for each of its kernels; tests compare the bytes with what Triton's interpreter loads
and stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doge_deploy.errors import UnsupportedModelError
from doge_deploy.kernels.spec import Cost, OperatorPlugin


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
