"""The one table of tolerances.

A tolerance is calibrated, not chosen: the reference is run twice on the same calls, in the bundle's dtype and in the
next wider one (float64 for float32, float32 for float16 and bfloat16). Their difference is the noise of that arithmetic
on that very input; a bundle may differ from the reference by `factor` times that noise, in the largest element and in
the root mean square. The fewer independent errors there are, the further two root mean squares may be apart by chance,
that of the noise and that of the bundle: `small_sample_factor` allows for it. The floor is for tensors on which the
reference happens to make (nearly) no error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """One row of the table."""

    factor_max: float
    """Times the largest absolute noise."""
    factor_rms: float
    """Times the root mean square of the noise."""
    floor_ulps: float
    """The least that is allowed for the largest error, in units in the last place of the tensor's largest number; a
    quarter of it for the rms (one rounding has an rms of 0.29 units)."""
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "logits": Tolerance(
        6.0,
        3.0,
        1.0,
        "Two libraries that sum a row's products in different orders differ by up to 2.1 times PyTorch's own noise: "
        "its single-row GEMV makes half the error of ONNX Runtime's (pytest -s tests/verify/test_tolerance.py). Errors "
        "of layers add up in rms alike; 3 leaves room for fused norms and softmax. The largest of many elements "
        "scatters twice as far.",
    ),
    "last_hidden_state": Tolerance(6.0, 3.0, 1.0, "As logits."),
    "key": Tolerance(6.0, 3.0, 1.0, "As logits."),
    "value": Tolerance(6.0, 3.0, 1.0, "As logits."),
    "score": Tolerance(
        6.0,
        3.0,
        2.0,
        "As logits; the floor is higher since exp and log of two libraries differ by an ulp or two each.",
    ),
    "kernel": Tolerance(
        6.0,
        3.0,
        1.0,
        "One operator against its reference implementation: as logits. The noise is that of eight random inputs of one "
        "shape, since few numbers' errors hang on the rounding of a few large logits: one input (2 rows, 257 keys) had "
        "a third of the rms noise of all eight, and the kernel, which was within twice that of all, was five times as "
        "far off.",
    ),
    "kept": Tolerance(
        6.0,
        3.0,
        2.0,
        "How far a kept key may score below the reference's w-th place, or a dropped one above it: as `score`, in "
        "whose noise "
        "it is measured.",
    ),
    "experts": Tolerance(
        6.0,
        3.0,
        2.0,
        "As kept, for sums of two router logits, in twice the noise of the router logits.",
    ),
}

WIDER = {"float32": "float64", "float16": "float32", "bfloat16": "float32"}
"""The dtype that a dtype's noise is measured against."""

ULP = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Relative spacing of numbers."""


@dataclass(frozen=True)
class AllowedDifference:
    """What a quantity may differ by in one case."""

    max_abs: float
    rms: float


def share_text(share: float) -> str:
    """A share of a tolerance for people: in per cent, or how many times it is used."""
    if not math.isfinite(share):
        return "∞"
    return f"{share:.0%}" if share < 10 else f"{share:.0f}×"


def small_sample_factor(count: float, draws: int = 1) -> float:
    """How much larger than the root mean square of the noise that of equally large errors may be by chance alone.

    What is judged is one draw of `count` independent errors; the noise was measured on `draws` of them. The ratio of
    the two mean squares has Fisher's F distribution with `count` and `count * draws` degrees of freedom; the factor, a
    root, is passed once in ten thousand times. For 9 draws: 6.9 for 1 error, 3.3 for 3, 2.0 for 10, 1.3 for 100.

    For one draw it is taken from Fisher's z (1924): half the logarithm of the ratio is normal with variance 1/count.
    That is too strict for a few errors (6.4 for 4); what fails by it is judged by more draws. Otherwise the cube root
    of F is taken for normal (Paulson 1942), which is right to 4 % of the factor for one error and better for more.
    """
    count = max(count, 1)
    z = _ONCE_IN_TEN_THOUSAND
    ours, theirs = 2 / (9 * count), 2 / (9 * count * draws)
    square = (1 - theirs) ** 2 - z**2 * theirs
    if draws == 1 or square <= 0:  # fewer than four errors in all have no root here
        return math.exp(z / math.sqrt(count))
    middle = (1 - ours) * (1 - theirs)
    cube_root = (middle + math.sqrt(middle**2 - square * ((1 - ours) ** 2 - z**2 * ours))) / square
    return float(cube_root**1.5)


_ONCE_IN_TEN_THOUSAND = 3.72
"""Standard deviations of a normal number that chance passes so rarely."""


def limit(
    quantity: str,
    dtype: str,
    *,
    noise_max: float,
    noise_rms: float,
    scale: float,
    count: float | None = None,
    draws: int = 1,
) -> AllowedDifference:
    """The limits of one tensor.

    Args:
        quantity: a row of `TOLERANCES`.
        dtype: the bundle's.
        noise_max, noise_rms: of the reference, same tensor, same calls.
        scale: largest absolute value of the reference's tensor.
        count: how many independent errors one run makes (`Noise.effective`); very many where None.
        draws: runs that the noise was measured on.
    """
    row = TOLERANCES[quantity]
    floor = row.floor_ulps * ULP[dtype] * scale
    chance = 1.0 if count is None else small_sample_factor(count, draws)
    rms = max(row.factor_rms * noise_rms, floor / 4) * chance
    # The largest of a few errors is hardly more than their rms, and no better known: it gets at least the same limit.
    return AllowedDifference(max(row.factor_max * noise_max, floor, rms), rms)
