"""Which cases of a long table every run has, and which only `make test-full`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def cases(table: Mapping[str, Any], always: Iterable[str]) -> list[Any]:
    """Parameters of `pytest.mark.parametrize`, one a row of `table`; rows not named in `always` are marked `sweep`.

    A row is the tuple of values, or the one value, that the test takes; its key is the id.
    """
    rows = {name: row if isinstance(row, tuple) else (row,) for name, row in table.items()}
    return [pytest.param(*row, id=name, marks=marks) for name, (row, marks) in _marked(rows, always).items()]


def fixture_cases(table: Mapping[str, Any], always: Iterable[str]) -> list[Any]:
    """The same as `params` of a fixture, whose `request.param` is the whole row."""
    return [pytest.param(row, id=name, marks=marks) for name, (row, marks) in _marked(table, always).items()]


def _marked(table: Mapping[str, Any], always: Iterable[str]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    always = set(always)
    unknown = always - set(table)
    assert not unknown, f"no such cases: {sorted(unknown)}"
    return {name: (row, () if name in always else (pytest.mark.sweep,)) for name, row in table.items()}
