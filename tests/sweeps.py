"""Which cases of a long table every run has, and which only `make test-full`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def cases(table: Mapping[str, Any], always: Iterable[str]) -> list[Any]:
    """Parameters of `pytest.mark.parametrize`, one a row of `table`; rows not named in `always` are marked `sweep`.

    A row is the tuple of values, or the one value, that the test takes; its key is the id.
    """
    always = set(always)
    unknown = always - set(table)
    assert not unknown, f"no such cases: {sorted(unknown)}"
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), id=name, marks=_marks(name in always))
        for name, row in table.items()
    ]


def _marks(always: bool) -> tuple[Any, ...]:
    return () if always else (pytest.mark.sweep,)
