"""Kernels behind PyTorch's operators: in the interpreter here, on the device where a test is marked `gpu`."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import AttentionCase, check_close, noise_of

pytest.importorskip("triton", reason="kernels need Triton, which exists for Linux only")

from doge_deploy.errors import MissingDependencyError
from doge_deploy.kernels import torch_ops
from doge_deploy.kernels.registry import Registry
from doge_deploy.kernels.torch_ops import kernels_in_torch
from doge_deploy.model.attention import dynamic_mask_attention
from doge_deploy.model.moe import cdmoe

CASES = [
    AttentionCase(Q=17, K=40, w=8, H=4, Hkv=2),
    AttentionCase(Q=1, K=40, w=8, B=2),
    AttentionCase(Q=2, K=9, w=0, masked=True),
]


def call(case: AttentionCase, device: str) -> tuple[torch.Tensor, list[str]]:
    inputs = {
        name: (tensor.nan_to_num(0.0) if tensor.is_floating_point() else tensor).to(device)
        for name, tensor in case.inputs().items()
    }
    arguments = [inputs[name] for name in ("query", "key", "value", "score", "first_slot")]
    selected: list[str] = []
    with kernels_in_torch(device, lambda kind, _: selected.append(kind)):
        output = dynamic_mask_attention(*arguments, inputs.get("key_mask"), case.w, case.D**-0.5)
    return output.cpu(), selected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operator_runs_as_kernels(case: AttentionCase) -> None:
    output, selected = call(case, "cpu")
    assert selected == (["kept"] if case.w else [])
    check_close(output, case.twin(case.inputs(), case.dtype), noise_of(case))


def test_the_slow_twin_is_back_afterwards() -> None:
    case = CASES[0]
    twin = case.twin(case.inputs(), "float32")
    call(case, "cpu")
    assert torch.equal(case.twin(case.inputs(), "float32"), twin)


def test_experts_run_as_kernels_and_say_which() -> None:
    torch.manual_seed(0)
    arguments = (torch.randn(2, 3, 32), torch.randn(2, 3, 8), torch.randn(16, 32), torch.randn(16, 32))
    seen: list[tuple[str, tuple[int, ...]]] = []
    with kernels_in_torch("cpu", lambda kind, value: seen.append((kind, tuple(value.shape)))):
        found = cdmoe(*arguments, [], 3, False, "reference", "silu")
    assert seen == [("experts", (6, 3))]
    torch.testing.assert_close(found, cdmoe(*arguments, [], 3, False, "reference", "silu"), rtol=1e-5, atol=1e-4)


def test_shapes_are_known_without_running() -> None:
    """The fake implementation: what a compiler traces with."""
    with torch.device("meta"), kernels_in_torch("cpu"):
        query, key = torch.empty(1, 2, 3, 16), torch.empty(1, 1, 9, 16)
        score, first_slot = torch.empty(1, 1, 9, 1), torch.empty(1, dtype=torch.long)
        output = dynamic_mask_attention(query, key, key, score, first_slot, None, 4, 0.25)
    assert output.shape == (1, 2, 3, 16)
    assert output.device.type == "meta"


def test_without_a_device_and_an_interpreter_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = "kernels run on a CUDA device, not on 'cpu'"
    with pytest.raises(MissingDependencyError, match=message), kernels_in_torch("cpu"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize(
    ("rows", "slots", "window"),
    [(1, 257, 64), (1, 64, 64), (65, 65, 64), (257, 1025, 64), (257, 257, 0), (1, 1025, 0)],
    ids=lambda n: str(n),
)
def test_kernels_on_a_device(rows: int, slots: int, window: int, size: int, dtype: str) -> None:
    case = AttentionCase(Q=rows, K=slots, w=window, B=2, H=4, Hkv=2, D=size, dtype=dtype)
    output, _ = call(case, "cuda")
    check_close(output, case.twin(case.inputs(), dtype), noise_of(case))


@pytest.mark.parametrize(("missing", "known"), [("CDMoE", "DynamicMaskAttention"), ("DynamicMaskAttention", "CDMoE")])
def test_a_plugin_that_is_not_installed_is_named(missing: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch_ops.installed()
    registry = Registry({key: value for key, value in whole.operators.items() if key[1] != missing}, whole.origins)
    monkeypatch.setattr(torch_ops, "_registry", lambda: registry)
    with pytest.raises(MissingDependencyError) as caught, kernels_in_torch("cpu"):
        pass
    assert str(caught.value).startswith(
        f"no plugin for doge::{missing} is installed (entry points 'doge_deploy.plugins': {known}): install doge-deploy"
    )
    assert caught.value.exit_code == 4
