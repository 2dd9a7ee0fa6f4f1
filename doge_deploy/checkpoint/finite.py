"""Values that no model should have: NaN, infinities, and numbers too large for the dtype of an export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from doge_deploy.checkpoint.read import Checkpoint
from doge_deploy.diagnostics import join_findings
from doge_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch


def check_finite(
    checkpoint: Checkpoint,
    progress: Callable[[int], None] | None = None,
    *,
    dtype: str = "float32",
    others: Mapping[str, str] | None = None,
) -> None:
    """Read every tensor once, one at a time.

    Args:
        checkpoint: what to check.
        progress: called after every tensor with its number of bytes.
        dtype: what the weights will be converted to: float32, float16 or bfloat16.
        others: names of tensors that are converted to another dtype, and which.

    Raises:
        UnsupportedModelError: values are NaN or infinite, or become so in their dtype; names every such tensor.
    """
    findings = []
    for name, info in checkpoint.tensors.items():
        finding = _finding(checkpoint.read(name), (others or {}).get(name, dtype))
        if finding:
            findings.append(f"{name} has {finding}")
        if progress is not None:
            progress(info.nbytes)
    if findings:
        raise UnsupportedModelError(f"{checkpoint.path}: weights must be finite: {join_findings(findings)}")


def _finding(tensor: torch.Tensor, dtype: str) -> str:
    """What is wrong with the values of one tensor, in words; empty if nothing is."""
    import torch

    # NaN and infinities survive aminmax, so that one pass without copies clears a sound tensor
    ends = torch.stack(tensor.aminmax())
    if bool(torch.isfinite(ends.to(getattr(torch, dtype))).all()):
        return ""
    nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    if nan or inf:
        return " and ".join(f"{count} {what}" for count, what in ((nan, "NaN"), (inf, "infinities")) if count)
    largest = float(tensor.abs().max())
    return f"values up to {largest:g}, beyond {dtype}'s {torch.finfo(getattr(torch, dtype)).max:g}"
