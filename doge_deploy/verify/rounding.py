"""The reference with other rounding errors: another draw of its noise.

Every number that a linear layer reads is rounded once more, by chance, which also draws anew the roundings of all sums
that follow.
Reference: Parker, Monte Carlo Arithmetic (1997); its "random rounding" of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def rounded_once_more(model: nn.Module, seed: int) -> Iterator[None]:
    """While this lasts, inputs of the model's linear layers are off by a unit in the last place, one in twelve.

    That is the variance of one rounding, 1/12 of a squared unit. The seed decides which.
    """
    generator = torch.Generator().manual_seed(seed)

    def perturb(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        drawn = torch.rand(x.shape, generator=generator)
        sign = (drawn < 1 / 24).to(x.dtype) - (drawn > 23 / 24).to(x.dtype)
        return (x * (1 + torch.finfo(x.dtype).eps * sign), *others)

    handles = [module.register_forward_pre_hook(perturb) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
