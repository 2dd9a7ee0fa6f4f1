"""The localiser names the stage that errs, and no neighbour of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from localize_faults import ALWAYS, FAULTS, Fault
from sweeps import cases

from doge_deploy.verify.localize.run import localize


@pytest.mark.parametrize("fault", cases(FAULTS, ALWAYS))
def test_a_planted_fault_is_named(fault: Fault, tmp_path: Path) -> None:
    found = localize(fault.plant(tmp_path / "b"), fault.case, portable=fault.portable, greedy_steps=8)
    finding = found.finding
    text = "\n".join(found.lines())
    assert finding is not None, text
    named = (finding.call, finding.layer, finding.stage, set(finding.columns), finding.reason)
    assert named == (fault.call, fault.layer, fault.stage, set(fault.columns) & set(found.columns), fault.reason), text
    assert fault.detail in finding.detail, text
    assert fault.blames in finding.fault_of, text
