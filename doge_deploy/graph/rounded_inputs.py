"""Which products of a graph an engine computes in few bits on both sides, and what the other side is rounded to.

The standard graph rounds weights only, so that it can be compared with a reference of the same weights. What engines
round beside it is noted at the product, and becomes operators where the graph is lowered for them.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

_KEY = "doge_deploy.rounded_input"


class RoundedInput(NamedTuple):
    """What the first input of a product is rounded to."""

    dtype: str
    """A key of `doge_deploy.dtypes.DTYPES`."""
    scale: float
    """Of the whole tensor, a power of two."""


def mark_rounded(product: ir.Node, dtype: str, scale: float) -> None:
    """Note that an engine rounds the first input of a product."""
    product.metadata_props[_KEY] = f"{dtype} {scale!r}"


def rounded_input(product: ir.Node) -> RoundedInput | None:
    """What was noted; None where the input stays as it is."""
    text = product.metadata_props.get(_KEY)
    if text is None:
        return None
    dtype, scale = text.split()
    return RoundedInput(dtype, float(scale))
