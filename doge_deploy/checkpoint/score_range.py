"""Whether the dynamic mask's score, exp(A * softplus(dt)), can overflow: proved from weights, for any input.

Axes: C hidden, Hkv key/value heads, S heads of the score, D head_dim.

A layer sees x_hat = x / rms(x), of which ||x_hat||_2 <= sqrt(C), scaled by its norm weight g:

    dt = W_dt (W_v (g * x_hat) + b_v) + b_dt = R x_hat + c      with R = W_dt W_v diag(g), c = W_dt b_v + b_dt

By Cauchy-Schwarz every dt_h lies within c_h +- ||R_h||_2 sqrt(C), rounding apart. The exponent
A_h softplus(dt_h) grows with dt_h where A_h > 0, and is at most 0, hence harmless, elsewhere.
Reference: `DogeAttention.forward` in transformers' modeling_doge.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from doge_deploy.checkpoint.read import Checkpoint
from doge_deploy.diagnostics import join_findings
from doge_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch


def check_score_range(checkpoint: Checkpoint, dtype: str) -> list[str]:
    """Warnings, one per head whose score might overflow.

    Args:
        checkpoint: whose A, dt_proj, v_proj and input_layernorm are read.
        dtype: float32, float16 or bfloat16, in which the score is added to the attention weights.

    Raises:
        UnsupportedModelError: a score overflows for every input.
    """
    import torch

    limit = math.log(torch.finfo(getattr(torch, dtype)).max)
    warnings, certain = [], []
    for layer in range(checkpoint.facts.num_hidden_layers):
        decay, lower, upper = _exponents(checkpoint, layer)
        for head in range(checkpoint.facts.num_score_heads):
            place = f"layer {layer} head {head}: A={float(decay[head]):.4g}"
            if lower[head] > limit:
                certain.append(f"{place}, exponent at least {float(lower[head]):.4g}")
            elif upper[head] > limit:
                warnings.append(
                    f"{place}: the score may overflow {dtype}: its exponent is only known to be at most "
                    f"{float(upper[head]):.4g}, and {dtype} holds exp({limit:.4g})"
                )
    if certain:
        raise UnsupportedModelError(
            f"{checkpoint.path}: the dynamic mask's score overflows {dtype}, which holds exp({limit:.4g}), "
            f"for every input: {join_findings(certain)}"
        )
    return warnings


def _exponents(checkpoint: Checkpoint, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, and the least and greatest of A * softplus(dt): three `[S]`, float64."""
    import torch
    import torch.nn.functional as F

    prefix = f"model.layers.{layer}."

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(prefix + name).double()

    dt_proj = read("self_attn.dt_proj.weight")
    rows = dt_proj @ read("self_attn.v_proj.weight") * read("input_layernorm.weight")
    radius = rows.norm(dim=1) * math.sqrt(checkpoint.facts.hidden_size)
    centre = torch.zeros_like(radius)
    if checkpoint.facts.attention_bias:
        centre = dt_proj @ read("self_attn.v_proj.bias") + read("self_attn.dt_proj.bias")
    decay = read("self_attn.A")
    ends = torch.stack((decay * F.softplus(centre - radius), decay * F.softplus(centre + radius)))
    return decay, ends.amin(dim=0), ends.amax(dim=0)
