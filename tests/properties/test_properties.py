"""A small fixed part of the property test, and every example that failed once; `nox -s properties` draws more."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from properties.check import check
from properties.regressions import REGRESSIONS
from properties.space import Example, examples


@pytest.mark.parametrize("example", REGRESSIONS.values(), ids=REGRESSIONS.keys())
def test_what_failed_once_passes(example: Example) -> None:
    assert not check(example)


@settings(
    max_examples=6,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(examples())
def test_a_fixed_few_of_all_examples_pass(example: Example) -> None:
    assert not check(example), example
