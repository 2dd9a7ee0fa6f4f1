"""Versions of libraries as they are found: pre-releases, local builds, four numbers, and what is no version."""

from __future__ import annotations

import pytest
from packaging.version import InvalidVersion

from doge_deploy.devices.versions import _at_least, at_least


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("10.15.1", "10.15.1"),
        ("10.16", "10.15.1"),
        ("11.0", "8.7"),
        ("10.15", "10.15.0"),
        ("1.33rc1", "1.33"),
        ("1.33.0.dev20261101", "1.33.0"),
        ("1.7.1.116+cu13", "1.7.1.116"),
        ("1.100", "1.25"),
    ],
)
def test_late_enough(version: str, first: str) -> None:
    assert at_least(version, first)


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("10.3", "10.15.1"),
        ("10.15", "10.15.1"),
        ("1.32rc1", "1.33"),
        ("7.2", "7.5"),
        ("unknown", "1.0"),
        ("", "1.0"),
    ],
)
def test_too_early(version: str, first: str) -> None:
    assert not at_least(version, first)


def test_a_bound_must_be_a_version() -> None:
    with pytest.raises(InvalidVersion):
        at_least("1.0", "new")


NUMBERS = (
    "0",
    "0.0",
    "1",
    "1.0",
    "1.0.0",
    "1.0.1",
    "01.2",
    "1.2",
    "1.2.0",
    "1.10",
    "10.15.1",
    "10.15",
    "1.7.1.116",
    "1.2.0.1",
)


@pytest.mark.parametrize("version", NUMBERS)
def test_numbers_and_dots_are_compared_without_packaging_as_with_it(version: str) -> None:
    for first in NUMBERS:
        assert at_least(version, first) == _at_least(version, first), (version, first)
