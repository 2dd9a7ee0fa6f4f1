"""Inputs for the kernels, and the judgement of their outputs."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from doge_deploy.model.attention import dynamic_mask_attention, keep_mask
from doge_deploy.verify.tolerance import WIDER, limit


@dataclass(frozen=True)
class AttentionCase:
    """One node of doge::DynamicMaskAttention. Its id says the shape."""

    Q: int
    K: int
    w: int
    B: int = 1
    H: int = 2
    Hkv: int = 1
    S: int | None = None
    D: int = 16
    levels: int | None = None
    """Distinct scores; None: all different."""
    masked: bool = False
    sliding: int = 0
    dtype: str = "float32"
    seed: int = 0

    @property
    def score_heads(self) -> int:
        return self.S or self.Hkv

    def __str__(self) -> str:
        scores = {None: "", 1: "-all-equal"}.get(self.levels, f"-{self.levels}-levels")
        heads = f"H{self.H}-Hkv{self.Hkv}" + (f"-S{self.S}" if self.S else "")
        window = f"w{self.w}" if self.w else "no-window"
        mask = ("-padding" if self.masked else "") + (f"-sliding{self.sliding}" if self.sliding else "")
        return f"B{self.B}-{heads}-Q{self.Q}-K{self.K}-D{self.D}-{window}{scores}{mask}-{self.dtype}"

    def inputs(self) -> dict[str, torch.Tensor]:
        """Tensors of the node. Slots that no row sees hold NaN, as a cache may before it is written."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * self.Q + self.K)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        dtype = getattr(torch, self.dtype)
        shape = (self.B, self.score_heads, self.K, 1)
        score = torch.exp(normal(*shape))
        if self.levels:
            score = torch.randint(1, self.levels + 1, shape, generator=generator).float() / 2
        # the last row of the batch sees all slots, each row before it one less
        first_slot = (torch.arange(self.B) + self.K - self.Q - self.B + 1).clamp(min=0)
        tensors = {
            "query": normal(self.B, self.H, self.Q, self.D).to(dtype),
            "key": normal(self.B, self.Hkv, self.K, self.D).to(dtype),
            "value": normal(self.B, self.Hkv, self.K, self.D).to(dtype),
            "score": score,
            "first_slot": first_slot,
        }
        if self.masked:
            tensors["key_mask"] = torch.rand(self.B, self.K, generator=generator) > 0.3
            tensors["key_mask"][:, 0] = True
        for b, first in enumerate(first_slot.tolist()):
            for name in ("key", "value", "score"):
                tensors[name][b, :, first + self.Q :] = float("nan")
        return tensors

    def visible(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[B, S, Q, K]`"""
        rows = inputs["first_slot"][:, None] + torch.arange(self.Q)
        visible = torch.arange(self.K) <= rows[:, :, None]
        if self.sliding:
            visible = visible & (torch.arange(self.K) > rows[:, :, None] - self.sliding)
        if self.masked:
            visible = visible & inputs["key_mask"][:, None, :]
        return visible[:, None].expand(-1, self.score_heads, -1, -1)

    def kept(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[B, S, Q, K]`: what the slow twin keeps."""
        visible = self.visible(inputs)
        ranked = torch.where(visible, inputs["score"].transpose(2, 3), -1.0)
        return visible & keep_mask(ranked, self.w)

    def twin(self, inputs: dict[str, torch.Tensor], dtype: str) -> torch.Tensor:
        """The slow twin, computed in `dtype`, which needs finite numbers everywhere; zeros in rows that see no key."""
        finite = {name: t.nan_to_num(0.0) if t.is_floating_point() else t for name, t in inputs.items()}
        typed = [finite[name].to(getattr(torch, dtype)) for name in ("query", "key", "value")]
        arguments = (*typed, finite["score"], finite["first_slot"], finite.get("key_mask"), self.w, self.D**-0.5)
        output = dynamic_mask_attention(*arguments, self.sliding)
        sees = self.visible(inputs).any(-1, keepdim=True).repeat_interleave(self.H // self.score_heads, 1)
        return torch.where(sees, output, 0.0)

    @property
    def attributes(self) -> dict[str, Any]:
        sliding = {"sliding_window": self.sliding} if self.sliding else {}
        return {"keep_window_size": self.w, "scale": self.D**-0.5, **sliding}

    def with_dtype(self, dtype: str) -> AttentionCase:
        return replace(self, dtype=dtype)


SWEEP = os.environ.get("DOGE_KERNEL_SWEEP") == "1"
"""Set by `nox -s kernels`, which runs many drawn shapes and the large ones."""

large = pytest.mark.skipif(not SWEEP, reason="takes long in the interpreter; nox -s kernels runs it")

DRAWS = 8
"""Random inputs of one shape that noise is measured on: the error of a small output hangs on one or two roundings, and
a single draw of them may be lucky.
"""


RMS_FROM = 16
"""Rows. Of fewer only the largest error is judged: all numbers of a row share its weights, whose rounding may be lucky
in the twin. One expert's gate alone made an rms of 0.9 units in the last place, four times that of the noise.
"""


def noise_of(case: Any) -> torch.Tensor:
    """Differences between the slow twin and its wider self, on `DRAWS` inputs of the case's shape."""
    noise = []
    for seed in range(DRAWS):
        inputs = replace(case, seed=case.seed + seed).inputs()
        noise.append(case.twin(inputs, case.dtype).double() - case.twin(inputs, WIDER[case.dtype]).double())
    return torch.stack(noise)


def check_close(found: torch.Tensor, expected: torch.Tensor, noise: torch.Tensor) -> None:
    """Hold a kernel's output against its twin within the noise of the twin's own dtype."""
    dtype = str(found.dtype).removeprefix("torch.")
    assert found.dtype == expected.dtype
    found, expected = found.double(), expected.double()
    error = found - expected
    allowed = limit(
        "kernel",
        dtype,
        noise_max=noise.abs().max().item(),
        noise_rms=noise.square().mean().sqrt().item(),
        scale=expected.abs().max().item(),
    )
    assert found.isfinite().all()
    assert error.abs().max().item() <= allowed.max_abs
    if error[..., 0].numel() >= RMS_FROM:
        assert error.square().mean().sqrt().item() <= allowed.rms
