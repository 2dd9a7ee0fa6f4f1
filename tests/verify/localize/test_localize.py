"""The localiser names the stage that errs, and no neighbour of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import shared_bundle
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


def test_a_fault_that_vanishes_when_it_is_watched_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner whose graph has no further outputs errs; one that shows something does not."""
    from doge_deploy.runtime.ort.runners import StaticOrtRunner

    right = StaticOrtRunner._run_part

    def wrong(self: StaticOrtRunner, *arguments: object) -> object:
        logits = right(self, *arguments)  # type: ignore[arg-type]
        return logits if any(not name.startswith("kept") for name in self.extra_outputs) else logits * 1.01

    monkeypatch.setattr(StaticOrtRunner, "_run_part", wrong)
    found = localize(shared_bundle("doge-tiny"), "prefill")
    assert found.finding is not None
    assert found.finding.reason == "vanished", found.lines()


def test_errors_that_only_add_up_are_called_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that allows nothing: no stage is to blame for what it finds."""
    from doge_deploy.verify import parity
    from doge_deploy.verify.tolerance import AllowedDifference

    monkeypatch.setattr(parity, "limit", lambda *arguments, **options: AllowedDifference(0.0, 0.0))
    found = localize(shared_bundle("doge-tiny"), "prefill")
    assert found.finding is not None
    assert found.finding.reason == "noise", found.lines()
