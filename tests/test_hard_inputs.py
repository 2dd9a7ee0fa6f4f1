"""Every hard input that tests/hard_inputs knows is answered right, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hard_inputs.frame import Case, kinds, try_case

CASES = [(module.KIND, case) for module in kinds() for case in module.cases()]


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, id=f"{kind}, {case.name}", marks=[pytest.mark.sweep] if case.sweep else [])
        for kind, case in CASES
    ],
)
def test_hard_input(kind: str, case: Case, tmp_path: Path) -> None:
    outcome = try_case(case, tmp_path / "input")
    assert outcome.verdict != "wrong", outcome.says
