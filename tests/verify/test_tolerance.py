"""Why the factors of the tolerance table are what they are, and that the measures measure."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import parser

from doge_deploy.verify.compare import Distribution, difference, kl_divergence, top1
from doge_deploy.verify.tolerance import TOLERANCES, AllowedDifference, limit, small_sample_factor


@pytest.mark.parametrize("size", [128, 256, 512])
def test_two_summation_orders_differ_by_less_than_the_factor(size: int) -> None:
    """A row times a matrix: ONNX Runtime against PyTorch, in units of PyTorch's own error."""
    torch.manual_seed(size)
    weight, rows = torch.randn(64, size) / size**0.5, torch.randn(64, size)
    exact = (rows.double() @ weight.double().T).numpy()
    text = f'<ir_version: 10, opset_import: ["" : 18]> g (float[1,{size}] x) => (float[1,64] y) {{ y = MatMul (x, w) }}'
    model = parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight.T.contiguous().numpy(), "w"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    candidate = np.concatenate([session.run(None, {"x": row[None].numpy()})[0] for row in rows])
    reference = torch.cat([torch.nn.functional.linear(row[None], weight) for row in rows]).numpy()
    noise = difference([reference], [exact])
    found = difference([candidate], [reference])
    print(f"K={size}: difference {found.rms:.2e} rms, {found.rms / noise.rms:.2f} times PyTorch's noise")
    assert found.rms < TOLERANCES["value"].factor_rms * noise.rms
    assert found.max_abs < TOLERANCES["value"].factor_max * noise.max_abs


def test_every_row_has_a_reason() -> None:
    assert all(len(row.reason) > 5 for row in TOLERANCES.values())


def test_the_floor_is_one_rounding() -> None:
    allowed = limit("logits", "float16", noise_max=0.0, noise_rms=0.0, scale=8.0)
    assert allowed == AllowedDifference(max_abs=8 * 2.0**-10, rms=8 * 2.0**-10 / 4)


def test_difference_finds_the_worst_element() -> None:
    reference = [np.zeros((2, 3)), np.ones((1, 3))]
    candidate = [np.zeros((2, 3)), np.array([[1.0, 1.5, 1.0]])]
    found = difference(candidate, reference)
    assert (found.max_abs, found.worst_index, found.max_rel) == (0.5, (1, 0, 1), 0.5)
    assert found.rms == pytest.approx((0.25 / 9) ** 0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_never_pass(bad: float) -> None:
    found = difference([np.array([1.0, bad])], [np.array([1.0, 1.0])])
    assert found.non_finite == 1
    assert not found.within(AllowedDifference(np.inf, np.inf))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="candidate"):
        difference([np.zeros(2)], [np.zeros(3)])


def test_divergence_of_equal_and_shifted_logits_is_zero() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 9))
    assert kl_divergence(logits + 5, Distribution.whole(logits)) == pytest.approx(0, abs=1e-12)
    assert kl_divergence(-logits, Distribution.whole(logits)) > 0.1


def test_top1_reports_position_and_margin() -> None:
    reference = np.array([[0.0, 1.0], [3.0, 1.0]])
    found = top1(np.array([[0.0, 1.0], [0.0, 1.0]]), Distribution.whole(reference))
    assert (found.agreeing, found.total, found.first_divergence, found.margin) == (1, 2, 1, 2.0)


@pytest.mark.parametrize("count", [4, 6, 20, 128, 4096])
def test_chance_alone_rarely_passes_the_factor_of_a_small_sample(count: int) -> None:
    """Ratios of two root mean squares of equally large errors; a factor of 1 is passed half of the time."""
    draws = 4000
    generator = np.random.default_rng(count)
    errors = generator.normal(size=(2, draws, count))
    a, b = np.sqrt((errors**2).mean(axis=-1))
    passed = (a / b > small_sample_factor(count)).mean()
    print(f"{count} numbers: factor {small_sample_factor(count):.2f}, passed by {passed:.2%}")
    assert passed < 0.003
    assert (a / b > 1).mean() > 0.45


@pytest.mark.parametrize("count", [1, 3, 10, 100])
def test_many_draws_of_noise_leave_the_chance_of_the_one_that_is_judged(count: int) -> None:
    """The noise is known from nine draws, the bundle still makes one: F with `count` and 9 * `count` errors."""
    generator = np.random.default_rng(count)
    ours = generator.chisquare(count, 1_000_000) / count
    theirs = generator.chisquare(9 * count, 1_000_000) / (9 * count)
    passed = (np.sqrt(ours / theirs) > small_sample_factor(count, 9)).mean()
    print(f"{count} errors: factor {small_sample_factor(count, 9):.2f}, passed by {passed:.1e}")
    assert 5e-5 < passed < 1.5e-4


def test_a_factor_of_few_errors_in_all_is_finite() -> None:
    """What a damaged or old recording may say."""
    assert 1 < small_sample_factor(1, 2) < 100 and small_sample_factor(0, 3) > 1


def test_the_largest_of_few_errors_is_not_held_tighter_than_their_rms() -> None:
    few = limit("logits", "float32", noise_max=1e-8, noise_rms=8e-9, scale=0.5, count=2.0)
    many = limit("logits", "float32", noise_max=1e-6, noise_rms=3e-7, scale=0.5, count=1000.0)
    assert few.max_abs == few.rms
    assert many.max_abs == pytest.approx(6e-6)  # untouched
