"""Numbers in few bits."""

from __future__ import annotations

import pytest
import torch

from doge_deploy.graph.quantize import QuantizationScheme, packed, quantize

SCHEMES = {
    f"{bits}-bits-{block}-{'symmetric' if symmetric else 'asymmetric'}": QuantizationScheme(bits, block, symmetric)
    for bits in (4, 8)
    for block in (16, 32)
    for symmetric in (True, False)
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_error_is_at_most_what_rounding_and_clipping_give(scheme: QuantizationScheme) -> None:
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    result = quantize(weight, scheme)
    assert int(result.values.max()) < scheme.levels
    error = (result.dequantized() - weight).abs().reshape(7, -1, scheme.block_size)
    step = result.scale.abs()[..., None]
    largest = weight.abs().reshape(error.shape).amax(-1, keepdim=True)
    shrunk = 0.3 * largest if scheme.bits == 4 else 0.0
    assert (error <= 1.01 * (step + shrunk)).all()
    assert error.square().mean() < (step / 2).square().mean()
    if scheme.symmetric:
        assert set(result.zero_point.unique().tolist()) == {scheme.middle}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_zero_and_constant_blocks(scheme: QuantizationScheme) -> None:
    weight = torch.cat((torch.zeros(1, 32), torch.full((1, 32), -0.5), torch.full((1, 32), 3.0)))
    torch.testing.assert_close(quantize(weight, scheme).dequantized(), weight, rtol=1e-6, atol=0)


def test_trying_ranges_is_never_worse() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    scheme = QuantizationScheme(4, 32, True)
    largest = weight.reshape(64, 2, 32).abs().amax(-1)
    plain = (largest / 7)[..., None]
    rounded = torch.clamp(torch.round(weight.reshape(64, 2, 32) / plain), -8, 7) * plain
    assert (quantize(weight, scheme).dequantized() - weight).square().sum() < (
        rounded.reshape(64, 64) - weight
    ).square().sum()


def test_the_first_of_two_numbers_is_the_low_half() -> None:
    values = torch.tensor([[1, 2, 3], [4, 5, 15]], dtype=torch.uint8)
    assert packed(values, 4).tolist() == [0x21, 0x43, 0xF5]
    assert packed(values, 8) is values


@pytest.mark.parametrize(
    ("columns", "block_size", "block"),
    [(256, 128, 128), (512, 32, 32), (64, 128, 64), (192, 128, 64), (48, 32, 16), (16, 16, 16), (40, 32, None)],
)
def test_rows_get_the_largest_block_that_divides_them(columns: int, block_size: int, block: int | None) -> None:
    scheme = QuantizationScheme(8, block_size, True)
    assert scheme.block(columns) == block
    weight = torch.ones(3, columns)
    if block is None:
        with pytest.raises(ValueError, match=f"rows of {columns} numbers are no multiple of 16"):
            quantize(weight, scheme)
    else:
        assert quantize(weight, scheme).scale.shape == (3, columns // block)
