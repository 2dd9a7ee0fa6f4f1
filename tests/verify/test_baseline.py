"""A report held against an earlier one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import made_reports as made
import pytest

from doge_deploy.cli.main import run_command
from doge_deploy.errors import MismatchError, UsageError
from doge_deploy.verify.baseline import FLOOR, Baseline, compare, read_baseline
from doge_deploy.verify.files import report_json, write_json
from doge_deploy.verify.tolerance import share_text


def drifts(before: float, now: float) -> bool:
    result = compare(Baseline("old", "float32", {"static/a": before}), "float32", [made.case("a", logits=now, key=0)])
    return not result.passed


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (0.25, 0.50, False),
        (0.25, 0.51, True),
        (0.40, 0.79, False),
        (0.40, 0.81, True),
        (0.0, FLOOR, False),
        (0.0, FLOOR * 1.01, True),
        (0.01, 0.33, False),
        (0.3, math.inf, True),
        (math.inf, math.inf, False),
    ],
)
def test_twice_the_share_and_more_than_noise(before: float, now: float, expected: bool) -> None:
    assert drifts(before, now) is expected


def test_the_floor_is_the_noise_itself() -> None:
    assert pytest.approx(1 / 3) == FLOOR, "the tolerance of an rms is three times the noise"


def test_a_drift_names_case_tensor_and_both_shares(tmp_path: Path) -> None:
    write_json(made.report(made.case("prefill", key=0.1), made.case("decode")), tmp_path / "old.json")
    report = made.report(made.case("prefill", key=0.7), made.case("decode"))
    report.baseline = compare(read_baseline(tmp_path / "old.json"), report.dtype, report.results)
    assert not report.failed_cases, "every number is within its tolerance"
    assert not report.passed
    assert str(report.baseline.drifts[0]) == (
        "static/prefill: present.0.key uses 70% of its tolerance; the case used 30% before (allowed 60%)"
    )
    with pytest.raises(MismatchError, match=r"drifts from old\.json: static/prefill$"):
        report.require_passed()


def test_large_shares_are_said_as_factors() -> None:
    assert [share_text(share) for share in (0.304, 1.5, 12.04, math.inf)] == ["30%", "150%", "12×", "∞"]


def test_cases_of_one_side_are_told_and_not_judged() -> None:
    found = compare(
        Baseline("old", "float32", {"static/a": 0.3, "static/b": 0.3}), "float32", [made.case("a"), made.case("c")]
    )
    assert (found.compared, found.missing, found.new) == (1, ("static/b",), ("static/c",))
    assert found.passed


def test_another_dtype_or_no_common_case_is_refused() -> None:
    with pytest.raises(UsageError, match="is of a bundle in float16, this one is in float32"):
        compare(Baseline("old", "float16", {"static/a": 0.3}), "float32", [made.case("a")])
    with pytest.raises(UsageError, match="none of the cases that were judged: static/a"):
        compare(Baseline("old", "float32", {"growing/a": 0.3}), "float32", [made.case("a")])


BROKEN: dict[str, Any] = {
    "no json": "{",
    "a list": [],
    "no cases": {"dtype": "float32"},
    "empty": {"dtype": "float32", "cases": []},
    "no share": {"dtype": "float32", "cases": [{"layout": "static", "case": "a"}]},
    "a word": {"dtype": "float32", "cases": [{"layout": "static", "case": "a", "load": "much"}]},
    "negative": {"dtype": "float32", "cases": [{"layout": "static", "case": "a", "load": -1}]},
    "nan": {"dtype": "float32", "cases": [{"layout": "static", "case": "a", "load": "nan"}]},
    "true": {"dtype": "float32", "cases": [{"layout": "static", "case": "a", "load": True}]},
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_report_is_one_line(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError, match=r"--baseline .*old\.json (is not a report|has no cases)"):
        read_baseline(path)


def test_the_command_fails_on_drift_and_says_which(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(tiny_bundle), "--layout", "static", "--greedy-steps", "4"]
    assert run_command([*arguments, "--json", str(tmp_path / "old.json")]) == 0
    old = json.loads((tmp_path / "old.json").read_text())
    assert old["command"] == f"doge-deploy verify {tiny_bundle} --layout static --greedy-steps 4"
    assert run_command([*arguments, "--baseline", str(tmp_path / "old.json")]) == 0
    assert "12 cases compared with old.json, 0 drift" in capfd.readouterr().out
    worst = max(old["cases"], key=lambda case: case["load"])
    assert worst["load"] > FLOOR
    worst["load"] /= 2.1
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert run_command([*arguments, "--baseline", str(tmp_path / "old.json")]) == 1
    captured = capfd.readouterr()
    assert f"DRIFT static/{worst['case']}: " in captured.out
    assert f"drifts from old.json: static/{worst['case']}" in captured.err


def test_a_baseline_that_is_not_there_is_told_before_the_work(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["verify", str(tiny_bundle), "--baseline", str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read: No such file" in capfd.readouterr().err


def test_a_baseline_of_another_dtype_is_told_before_the_work(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_json(made.report(made.case("prefill"), dtype="float16"), tmp_path / "old.json")
    assert run_command(["verify", str(tiny_bundle), "--baseline", str(tmp_path / "old.json")]) == 2
    captured = capfd.readouterr()
    assert "old.json is of a bundle in float16, this one is in float32" in captured.err
    assert "load the reference" not in captured.err


def test_a_report_can_be_its_own_baseline(tmp_path: Path) -> None:
    report = made.report(made.case("prefill", logits=0.0, key=0.0))
    write_json(report, tmp_path / "r.json")
    assert report_json(report)["cases"][0]["load"] == 0.0
    assert compare(read_baseline(tmp_path / "r.json"), report.dtype, report.results).passed
