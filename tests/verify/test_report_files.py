"""Schema, Markdown and JUnit of reports, and where logits differ."""

from __future__ import annotations

import dataclasses
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import made_reports as made
import numpy as np
import pytest

from doge_deploy.verify import json_schema
from doge_deploy.verify.baseline import Baseline, compare
from doge_deploy.verify.cases import Case, chunk
from doge_deploy.verify.compare import Distribution
from doge_deploy.verify.files import report_json, write_junit
from doge_deploy.verify.markdown import report_markdown, write_markdown
from doge_deploy.verify.oracle import WeightsResult
from doge_deploy.verify.positions import FIRST_BIN, locate
from doge_deploy.verify.quality import QualityResult

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_schema_is_what_the_dataclasses_say() -> None:
    text = (DOCS / "verify-report.schema.json").read_text(encoding="utf-8")
    assert text == json_schema.text(), "run python -m doge_deploy.verify.json_schema > docs/verify-report.schema.json"


def test_every_part_of_a_report_fits_the_schema(report_validator: jsonschema.Draft202012Validator) -> None:
    report = made.report(made.case("prefill", logits=math.inf), made.case("decode", key=2.0), routing="reference")
    report.quality = [QualityResult("static", 3, math.nan, math.inf, 0.5, 0, None, 1.0, 1.0, ["bad"])]
    report.baseline = compare(Baseline("old.json", "float32", {"static/decode": 0.1}), "float32", report.results)
    report.localized = ("static/decode, call 1: ...",)
    found = json.loads(json.dumps(report_json(report), allow_nan=False))
    report_validator.validate(found)
    assert found["quality"][0]["mean_kl"] == "nan"
    assert found["cases"][0]["load"] == "inf"
    assert found["baseline"]["drifts"][0]["case"] == "static/decode"


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report.pop("passed"),
        lambda report: report.update(more=1),
        lambda report: report["cases"][0].update(selections="maybe"),
        lambda report: report["cases"][0]["quantities"]["logits"].update(max_abs="much"),
        lambda report: report["cases"][0]["positions"].update(token=["a"]),
        lambda report: report.update(format_version=2),
    ],
)
def test_the_schema_refuses(damage: object, report_validator: jsonschema.Draft202012Validator) -> None:
    found = json.loads(json.dumps(report_json(made.report(made.case("prefill")))))
    assert report_validator.is_valid(found)
    damage(found)  # type: ignore[operator]
    assert not report_validator.is_valid(found)


def test_markdown_has_the_verdict_the_table_and_the_reasons() -> None:
    report = made.report(made.case("prefill"), made.case("window K=w", key=1.5))
    report.recording = "a recording"
    text = report_markdown(report)
    assert "judged by a recording" in text
    assert text.startswith("### ❌ bundle does not compute what transformers computes: static/window K=w")
    assert "| ok | static | prefill |" in text
    assert "| **FAIL** | static | window K=w | 3.0e-06 | 150% | `present.0.key` | 3/4 |  |" in text
    assert "- static/window K=w: present.0.key: too far" in text
    assert "- window K=2w: needs 128 tokens" in text
    assert "```\ndoge-deploy verify bundle\n```" in text


def test_nothing_in_a_message_is_markdown() -> None:
    report = made.report(made.case("prefill"))
    report.weights = WeightsResult(1, ("<img src=x>\n# [a](b) `c` | d",))
    line = next(line for line in report_markdown(report).splitlines() if "img" in line)
    assert line == "- weights: \\<img src=x\\> \\# \\[a\\](b) \\`c\\` \\| d"


def test_many_failures_are_counted() -> None:
    report = made.report(made.case("prefill"))
    report.weights = WeightsResult(90, tuple(f"w{number}" for number in range(70)))
    text = report_markdown(report)
    assert "- weights: w19\n- and 50 more" in text


def test_markdown_is_appended_to_the_summary_of_a_job_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = made.report(made.case("prefill"))
    summary, other = tmp_path / "summary.md", tmp_path / "other.md"
    for path in (summary, other):
        path.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    write_markdown(report, summary)
    write_markdown(report, other)
    assert summary.read_text().startswith("before\n### ✅")
    assert other.read_text().startswith("### ✅")


def test_junit_has_a_case_for_the_baseline(tmp_path: Path) -> None:
    report = made.report(made.case("prefill", logits=0.9))
    report.baseline = compare(Baseline("old.json", "float32", {"static/prefill": 0.2}), "float32", report.results)
    write_junit(report, tmp_path / "r.xml")
    suite = ET.parse(tmp_path / "r.xml").getroot()
    assert (suite.get("failures"), suite.get("tests")) == ("1", str(len(suite)))
    failure = suite.find("testcase[@name='baseline']/failure")
    assert failure is not None
    assert "static/prefill: logits uses 90% of its tolerance" in failure.get("message", "")


def test_positions_name_call_row_token_and_the_worst_error() -> None:
    rows = [np.array([1, 2, 3, 4]), np.array([5, 6])]
    case = Case("batch", chunk(rows, [[2, 1], [2, 1]]), exact=False)
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(6, 9)).astype(np.float32)
    found = reference.copy()
    found[4, 7] += 0.5  # second call, first row, its second token
    pieces = [found[0:2], found[2:3], found[3:5], found[5:6]]
    positions, sample = locate(case, pieces, Distribution.whole(reference), last=False)
    assert positions.call == (0, 0, 0, 1, 1, 1)
    assert positions.row == (0, 0, 1, 0, 0, 1)
    assert positions.index == (0, 1, 0, 2, 3, 1)
    assert positions.token == (1, 2, 5, 3, 4, 6)
    assert [error > 0 for error in positions.error] == [False, False, False, False, True, False]
    assert positions.error[4] == pytest.approx(0.5)
    assert (sample.compared, sample.equal) == (54, 53)
    assert sum(sample.histogram) == 1
    assert 10 ** (FIRST_BIN + sample.histogram.index(1) / 2) <= 0.5
    assert (float(reference[4, 7]), float(found[4, 7])) in set(zip(sample.expected, sample.found, strict=True))


def test_positions_of_last_logits_and_of_numbers_that_are_not_finite() -> None:
    case = Case("decode", chunk([np.arange(5)], [[3], [1], [1]]), exact=False)
    reference = np.eye(3, 4, dtype=np.float32)
    found = reference.copy()
    found[1, 1] = np.nan
    positions, sample = locate(case, [found[:1], found[1:2], found[2:]], Distribution.whole(reference), last=False)
    assert positions.index == (2, 3, 4)
    assert positions.error == (0.0, math.inf, 0.0)
    assert positions.first_divergence == 1
    assert all(map(math.isfinite, (*sample.expected, *sample.found)))


def test_positions_where_the_reference_is_known_in_part() -> None:
    case = Case("decode", chunk([np.arange(2)], [[2]]), exact=False)
    ids = np.array([[3, 1], [0, 2]])
    known = Distribution(ids, np.array([[2.0, 1.0], [4.0, 0.0]]), np.ones((2, 2)), np.zeros(2))
    found = np.array([[0, 1, 9, 2], [4, 7, 0.25, 1]])
    positions, _ = locate(case, [found], known, last=False)
    assert positions.error == (0.0, 0.25)
    assert (positions.expected, positions.found) == ((3, 0), (2, 1))


def test_a_sample_is_small_whatever_the_case() -> None:
    case = Case("long", chunk([np.zeros(300, np.int64)], [[300]]), exact=False)
    logits = np.random.default_rng(0).normal(size=(300, 700)).astype(np.float32)
    _, sample = locate(case, [logits + 1e-6], Distribution.whole(logits), last=False)
    assert len(sample.expected) <= 301
    assert sum(sample.histogram) + sample.equal == sample.compared == 210_000


def test_the_fields_of_positions_are_equally_long() -> None:
    positions = made.case("prefill").positions
    assert positions is not None
    assert {len(values) for values in dataclasses.asdict(positions).values()} == {4}
