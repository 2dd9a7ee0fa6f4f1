"""Kernels of doge::CDMoE in Triton's interpreter against their slow twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import check_close, large, noise_of

pytest.importorskip("triton", reason="kernels need Triton, which exists for Linux only")

from doge_deploy.config.expert_pairs import candidate_pairs
from doge_deploy.kernels.launch import run_operator
from doge_deploy.model.moe import cdmoe, route, split_router
from doge_plugins.cdmoe.spec import ACTIVATIONS, PLUGIN
from doge_plugins.cdmoe.tiles import candidates


@dataclass(frozen=True)
class MoECase:
    """One node of doge::CDMoE. Its id says the shape."""

    B: int
    Q: int
    E: int
    k: int
    C: int = 32
    routing: str = "reference"
    norm: int = 0
    ties: bool = False
    activation: str = "silu"
    spread: int = 1
    """Standard deviation of what goes into the activation."""
    dtype: str = "float32"
    seed: int = 0

    def __str__(self) -> str:
        flags = ("-norm" if self.norm else "") + ("-ties" if self.ties else "")
        return f"B{self.B}-Q{self.Q}-C{self.C}-E{self.E}-k{self.k}-{self.routing}{flags}-{self.activation}-{self.dtype}"

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + self.E + self.Q)
        dtype = getattr(torch, self.dtype)
        router = torch.randn(self.B, self.Q, 2 * int(self.E**0.5), generator=generator)
        return {
            "hidden": (self.spread * torch.randn(self.B, self.Q, self.C, generator=generator)).to(dtype),
            "router_logits": (router.round() if self.ties else router).to(dtype),
            "down_embed": (torch.randn(self.E, self.C, generator=generator) * self.C**-0.5).to(dtype),
            "up_embed": torch.randn(self.E, self.C, generator=generator).to(dtype),
        }

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "num_experts_per_tok": self.k,
            "norm_topk_prob": self.norm,
            "routing": self.routing,
            "activation": self.activation,
        }

    def twin(self, inputs: dict[str, torch.Tensor], dtype: str) -> torch.Tensor:
        """The slow twin in `dtype`."""
        typed = {name: tensor.to(getattr(torch, dtype)) for name, tensor in inputs.items()}
        return cdmoe(*typed.values(), [], self.k, bool(self.norm), self.routing, self.activation)


CASES = [
    MoECase(1, 1, 256, 8),
    MoECase(1, 63, 4, 2, C=8),
    MoECase(1, 65, 4, 2, C=8, routing="per-token"),
    pytest.param(MoECase(1, 257, 16, 3), marks=large),
    pytest.param(MoECase(2, 65, 16384, 64), marks=large),
    MoECase(1, 17, 16, 3),
    MoECase(2, 3, 256, 8, ties=True),
    MoECase(2, 3, 256, 8, routing="per-token", ties=True, norm=1),
    MoECase(1, 3, 20, 3, C=33),
    MoECase(1, 3, 20, 16, ties=True),
    MoECase(1, 3, 9, 9),
    MoECase(1, 2, 1, 1),
    MoECase(1, 2, 1024, 16, C=256),
    MoECase(1, 1, 4096, 32, C=64),
    MoECase(1, 1, 16384, 64, C=65),
    MoECase(1, 1, 16384, 64, C=64, ties=True),
]


def check(case: MoECase) -> None:
    inputs = case.inputs()
    values = run_operator(PLUGIN, inputs, case.attributes, poison=True)
    ids, weights = route(split_router(inputs["router_logits"], case.routing), case.k, bool(case.norm))
    assert torch.equal(values["expert_ids"].flatten(0, 1).long(), ids)
    torch.testing.assert_close(values["expert_weights"].flatten(0, 1), weights.float(), rtol=1e-2, atol=1e-6)
    check_close(values["output"], case.twin(inputs, case.dtype), noise_of(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cdmoe(case: MoECase) -> None:
    check(case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [3, pytest.param(9, marks=pytest.mark.sweep)])
def test_activations(activation: str, tokens: int) -> None:
    for spread in (1, 12):  # some have corners at 6 and 10
        check(MoECase(1, tokens, 16, 4, activation=activation, spread=spread))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_round_as_the_model_does(dtype: str) -> None:
    """In a low precision many sums are equal: which ones is decided by their rounding."""
    case = MoECase(1, 9, 256, 8, dtype=dtype)
    inputs = case.inputs()
    values = run_operator(PLUGIN, inputs, case.attributes, poison=True)
    ids, _ = route(split_router(inputs["router_logits"], case.routing), case.k, False)
    assert torch.equal(values["expert_ids"].flatten(0, 1).long(), ids)


@dataclass(frozen=True)
class ClearMoECase(MoECase):
    """Router logits are distinct powers of two, so that the choice is the same in every precision."""

    def inputs(self) -> dict[str, torch.Tensor]:
        tensors = super().inputs()
        powers = (2.0 ** torch.arange(-4, 4)).to(getattr(torch, self.dtype))
        return {**tensors, "router_logits": powers.expand(self.B, self.Q, 8).clone()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_experts_in_low_precision(dtype: str) -> None:
    case = ClearMoECase(1, 3, 16, 2, dtype=dtype)
    inputs = case.inputs()
    values = run_operator(PLUGIN, inputs, case.attributes, poison=True)
    check_close(values["output"], case.twin(inputs, dtype), noise_of(case))


def test_int8_tables() -> None:
    case = MoECase(1, 5, 20, 4, C=48)
    inputs = case.inputs()
    for name in ("down", "up"):
        table = inputs[f"{name}_embed"]
        scale = table.abs().amax(1) / 127
        inputs[f"{name}_embed"] = torch.round(table / scale[:, None]).to(torch.int8)
        inputs[f"{name}_scale"] = scale
    values = run_operator(PLUGIN, inputs, case.attributes, poison=True)
    plain = {name: inputs[name] for name in ("hidden", "router_logits")}
    for name in ("down", "up"):
        plain[f"{name}_embed"] = inputs[f"{name}_embed"].float() * inputs[f"{name}_scale"][:, None]
    check_close(values["output"], case.twin(plain, "float32"), noise_of(case))


@settings(settings.get_profile("kernels"))
@given(st.data())
def test_cdmoe_of_any_shape(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 90))
    case = MoECase(
        B=data.draw(st.integers(1, 3)),
        Q=data.draw(st.integers(1, 6)),
        E=experts,
        k=data.draw(st.integers(1, min(int(experts**0.5) ** 2, 12))),
        C=data.draw(st.integers(1, 70)),
        routing=data.draw(st.sampled_from(["reference", "per-token"])),
        norm=data.draw(st.integers(0, 1)),
        ties=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 3)),
    )
    check(case)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 4), (9, 3), (16, 32), (64, 128)])
def test_candidates_are_those_of_the_twin(k: int, n: int) -> None:
    assert candidates(k, n) == len(candidate_pairs(k, n))


def test_a_wrong_expert_is_seen() -> None:
    """The teeth of `check`."""
    case = MoECase(1, 3, 256, 8)
    inputs = case.inputs()
    values = run_operator(PLUGIN, inputs, {**case.attributes, "routing": "per-token"})
    ids, _ = route(split_router(inputs["router_logits"], "reference"), case.k, False)
    assert not torch.equal(values["expert_ids"].flatten(0, 1).long(), ids)
    with pytest.raises(AssertionError):
        check_close(values["output"], case.twin(inputs, "float32"), noise_of(case))
