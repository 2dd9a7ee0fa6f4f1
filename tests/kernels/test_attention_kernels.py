"""Kernels of doge::DynamicMaskAttention in Triton's interpreter against their slow twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import AttentionCase, check_close, noise_of

pytest.importorskip("triton", reason="kernels need Triton, which exists for Linux only")

from doge_deploy.kernels.launch import run_operator
from doge_deploy.verify.tolerance import WIDER
from doge_plugins.dynamic_mask_attention.spec import LIST_ROWS, PLUGIN, SPLIT_KEYS, SPLIT_ROWS

W = 16

SHAPES = [
    # prompts of odd sizes, below, at and above the window
    AttentionCase(Q=1, K=1, w=W),
    AttentionCase(Q=15, K=15, w=W),
    AttentionCase(Q=16, K=16, w=W),
    AttentionCase(Q=17, K=17, w=W),
    AttentionCase(Q=63, K=63, w=W),
    AttentionCase(Q=64, K=64, w=W, levels=1),
    AttentionCase(Q=65, K=65, w=W, levels=3),
    AttentionCase(Q=65, K=130, w=W, B=2, masked=True),
    AttentionCase(Q=257, K=257, w=W),
    AttentionCase(Q=257, K=300, w=W, levels=1),
    # chunks with a past
    AttentionCase(Q=2, K=W - 1, w=W),
    AttentionCase(Q=2, K=W, w=W),
    AttentionCase(Q=2, K=W + 1, w=W),
    AttentionCase(Q=2, K=4 * W, w=W, levels=2),
    AttentionCase(Q=5, K=4 * W, w=W, masked=True, levels=2),
    # heads
    AttentionCase(Q=7, K=40, w=W, H=1),
    AttentionCase(Q=7, K=40, w=W, B=2, H=8, Hkv=2, levels=4),
    AttentionCase(Q=7, K=40, w=W, H=6, Hkv=2),
    AttentionCase(Q=7, K=40, w=W, H=4, Hkv=2, S=4),
    AttentionCase(Q=7, K=40, w=1),
    # no window
    AttentionCase(Q=65, K=65, w=0, B=2),
    AttentionCase(Q=63, K=100, w=0, masked=True, H=4),
    # a sliding window, at most as wide as the keys that are kept
    AttentionCase(Q=65, K=130, w=W, sliding=W, B=2),
    AttentionCase(Q=65, K=65, w=0, sliding=5, H=4, masked=True),
    # about the number of rows up to which keys are split among programs
    AttentionCase(Q=SPLIT_ROWS, K=70, w=W, H=4),
    AttentionCase(Q=SPLIT_ROWS + 1, K=70, w=W, H=4),
    AttentionCase(Q=SPLIT_ROWS, K=300, w=0, H=16, B=2),
]
STEPS = [
    AttentionCase(Q=1, K=W - 1, w=W),
    AttentionCase(Q=1, K=W, w=W, B=2),
    AttentionCase(Q=1, K=W + 1, w=W, H=4),
    AttentionCase(Q=1, K=4 * W, w=W, levels=1),
    AttentionCase(Q=1, K=65, w=W, levels=3, masked=True, B=2),
    AttentionCase(Q=3, K=63, w=W, H=6, Hkv=2, S=6),
    AttentionCase(Q=1, K=257, w=W, H=1),
    AttentionCase(Q=1, K=257, w=200, B=2, H=8, Hkv=2),
    AttentionCase(Q=1, K=257, w=0),
    AttentionCase(Q=2, K=257, w=0, masked=True, H=4),
    AttentionCase(Q=1, K=2 * SPLIT_KEYS, w=0, sliding=SPLIT_KEYS + 1),
    AttentionCase(Q=3, K=300, w=200, sliding=150, B=2, masked=True),
]
SIZES = [
    AttentionCase(Q=rows, K=40, w=W, D=size, dtype=dtype)
    for rows in (1, SPLIT_ROWS + 1)
    for size in (64, 96, 128, 256)
    for dtype in WIDER
]


def run(case: AttentionCase, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return run_operator(PLUGIN, inputs, case.attributes, poison=True)


def sets_of(case: AttentionCase, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[B, S, Q, K]`: the keys that the outputs of the select kernel say each row keeps."""
    score = values["score"].transpose(2, 3)
    threshold, last_kept = values["threshold"][..., None], values["last_kept"][..., None]
    best = (score > threshold) | ((score == threshold) & (torch.arange(case.K) <= last_kept))
    kept = case.visible(values) & best
    for b, s, block in torch.cartesian_prod(*(torch.arange(size) for size in values["kept_count"].shape)).tolist():
        listed = values["kept"][b, s, block, : values["kept_count"][b, s, block]].long()
        assert (listed[1:] > listed[:-1]).all(), "a list ascends"
        of_block = kept[b, s, block * LIST_ROWS : (block + 1) * LIST_ROWS]
        inside = torch.zeros(case.K, dtype=torch.bool).scatter(0, listed, True)
        if len(of_block) == 1:
            assert torch.equal(inside, of_block[0]), "the list of a row is its set"
        assert not (of_block & ~inside).any(), "the list of a block holds the sets of its rows"
    return kept


def check(case: AttentionCase) -> None:
    inputs = case.inputs()
    values = run(case, inputs)
    if case.w and not case.sliding:
        assert torch.equal(sets_of(case, values), case.kept(inputs))
    check_close(values["output"], case.twin(inputs, case.dtype), noise_of(case))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_prefill(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_decode(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_head_sizes_and_dtypes(case: AttentionCase) -> None:
    check(case)


@st.composite
def cases(draw: st.DrawFn, most_rows: int) -> AttentionCase:
    rows = draw(st.integers(1, most_rows))
    kv_heads = draw(st.integers(1, 2))
    group = draw(st.integers(1, 4))
    window = draw(st.integers(0, 40))
    return AttentionCase(
        Q=rows,
        K=rows + draw(st.integers(0, 40)),
        w=window,
        sliding=draw(st.sampled_from([0, 0, 1, 7, 40]).filter(lambda size: not window or size <= window)),
        B=draw(st.integers(1, 2)),
        H=kv_heads * group,
        Hkv=kv_heads,
        S=draw(st.sampled_from([None, kv_heads * group])),
        D=draw(st.sampled_from([8, 16, 24])),
        levels=draw(st.sampled_from([None, 1, 2, 5])),
        masked=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


@settings(settings.get_profile("kernels"))
@given(cases(most_rows=70))
def test_prefill_of_any_shape(case: AttentionCase) -> None:
    check(case)


@settings(settings.get_profile("kernels"))
@given(cases(most_rows=SPLIT_ROWS))
def test_decode_of_any_shape(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize("rows", [3, SPLIT_ROWS + 1])
@pytest.mark.parametrize("window", [0, 4])
def test_a_row_that_sees_nothing_is_zero(rows: int, window: int) -> None:
    case = AttentionCase(Q=rows, K=16, w=window, masked=True)
    inputs = case.inputs()
    inputs["first_slot"][:] = 0
    inputs["key_mask"] = torch.arange(16)[None] > 0
    for name in ("key", "value", "score"):
        inputs[name].nan_to_num_(0.0)
    output = run(case, inputs)["output"]
    assert (output[:, :, 0] == 0).all()
    assert output.isfinite().all()


@pytest.mark.parametrize("rows", [1, SPLIT_ROWS + 1])
def test_a_fault_in_a_selection_is_seen(rows: int) -> None:
    """The teeth of `check`: one key too many."""
    case = AttentionCase(Q=rows, K=40, w=W)
    inputs = case.inputs()
    values = run(replace(case, w=W + 1), inputs)
    assert not torch.equal(sets_of(case, values), case.kept(inputs))
    with pytest.raises(AssertionError):
        check_close(values["output"], case.twin(inputs, "float32"), noise_of(case))


def test_negative_zero_ties_with_zero() -> None:
    case = AttentionCase(Q=1, K=6, w=3)
    inputs = case.inputs()
    inputs["score"][:] = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, 0.0])[None, None, :, None]
    values = run(case, inputs)
    assert values["kept"][0, 0, 0, :3].tolist() == [0, 1, 2]
    assert values["kept_count"].item() == 3
