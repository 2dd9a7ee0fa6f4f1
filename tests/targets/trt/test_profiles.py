"""Optimization profiles from options."""

from __future__ import annotations

import pytest

from doge_deploy.errors import UsageError
from doge_deploy.options.build import BuildOptions, Range
from doge_deploy.targets.trt.profiles import make_profiles


def lengths(options: BuildOptions, max_length: int, kind: str) -> dict[str, tuple[int, int, int]]:
    profiles = make_profiles(options, max_length, kind)  # type: ignore[arg-type]
    return {p.name: tuple(p.axes["sequence_length"].model_dump().values()) for p in profiles}  # type: ignore[misc]


def test_one_profile_for_both() -> None:
    assert lengths(BuildOptions(), 2048, "shared") == {"shared": (1, 512, 2048)}


def test_one_profile_each() -> None:
    assert lengths(BuildOptions(), 2048, "separate") == {"prefill": (1, 512, 2048), "decode": (1, 1, 1)}


def test_a_short_bundle_bounds_the_best_length() -> None:
    assert lengths(BuildOptions(), 100, "shared") == {"shared": (1, 100, 100)}


def test_a_shared_profile_reaches_down_to_decode() -> None:
    options = BuildOptions(sequence_length=[16, 64, 128])  # type: ignore[arg-type]
    assert lengths(options, 2048, "shared") == {"shared": (1, 64, 128)}
    assert lengths(options, 2048, "separate") == {"prefill": (16, 64, 128), "decode": (1, 1, 1)}


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_decode_alone_is_one_profile(kind: str) -> None:
    assert lengths(BuildOptions(sequence_length=1), 2048, kind) == {"decode": (1, 1, 1)}  # type: ignore[arg-type]


def test_the_batch_is_that_of_every_profile() -> None:
    options = BuildOptions(batch_size=[1, 2, 4])  # type: ignore[arg-type]
    for profile in make_profiles(options, 64, "separate"):
        assert profile.axes["batch_size"] == Range(min=1, opt=2, max=4)


def test_a_call_longer_than_the_cache_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sequence_length=1,64,128: a call of 128 tokens does not fit.* is 100"):
        make_profiles(BuildOptions(sequence_length=[1, 64, 128]), 100, "shared")  # type: ignore[arg-type]
