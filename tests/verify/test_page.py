"""The HTML page of a report: whole, by itself, and nothing in it acts."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made_reports as made
import pytest

from doge_deploy.cli.main import run_command
from doge_deploy.verify.baseline import Baseline, compare
from doge_deploy.verify.oracle import WeightsResult
from doge_deploy.verify.page.charts import error_by_position, histogram, scatter
from doge_deploy.verify.page.tokens import MOST, visible
from doge_deploy.verify.page.write import heat_maps, report_html
from doge_deploy.verify.positions import Positions, Sample

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Tags with their attributes, and the text; complains where a tag is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words += data


def check_alone(page: str) -> Reader:
    """The page asks for nothing from anywhere and runs nothing."""
    reader = Reader(page)
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image", "use", "a"}
    for _, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "style", "srcset")]
    assert not re.search(r"url\(|@import|https?://", page)
    assert "default-src 'none'" in page
    return reader


@pytest.mark.parametrize("key", [0.2, 2.0, math.inf], ids=["good", "bad", "not finite"])
def test_a_page_is_whole_and_alone(key: float) -> None:
    report = made.report(made.case("prefill"), made.case("decode", "growing", key=key, layers=3), routing="reference")
    report.baseline = compare(
        Baseline("old.json", "float32", {"static/prefill": 0.1, "static/x": 1}), "float32", report.results
    )
    report.localized = ("static/decode, call 3, layer 5, stage `score`", "  reason: tie")
    report.recording = "the recording a.rec"
    reader = check_alone(report_html(report, lambda token: f"t{token}"))
    for words in (
        "Passed: bundle" if report.passed else "Failed: bundle",
        "static/prefill",
        "growing/decode",
        "Tolerance used",
        "t7 (7)",
        "the first other token",
        "needs 128 tokens",
        "stage `score`",
        "Since old.json",
        "the recording a.rec",
        "a processor, 2 CPUs",
        "doge-deploy verify bundle",
    ):
        assert words in reader.words, words
    assert sum(tag == "svg" for tag, _ in reader.tags) == 6


HOSTILE = '</td></table><script>alert(1)</script><img src=x onerror="alert(1)">\'"&\u202e{{ 7*7 }}'


def test_token_texts_and_names_are_only_text() -> None:
    case = made.case(HOSTILE, HOSTILE, key=3.0)
    case.failures.append(HOSTILE)
    report = made.report(case)
    report.bundle = Path(HOSTILE.replace("/", "\\"))
    report.weights = WeightsResult(1, (HOSTILE,))
    report.localized = (HOSTILE,)
    report.command = report.reference = report.checkpoint = HOSTILE
    report.skipped = {HOSTILE: HOSTILE}
    reader = check_alone(report_html(report, lambda token: HOSTILE))
    assert reader.words.count(HOSTILE) > 10
    assert "49" not in reader.words


def test_a_token_is_one_line_of_characters_that_are_seen() -> None:
    assert visible(" a\n\tb") == " a⏎⇥b"
    assert visible("\u202ea\x00\u00ad\u2028") == "⟨202E⟩a⟨0000⟩⟨00AD⟩⟨2028⟩"
    assert visible("e\u0301") == "e⟨0301⟩"
    assert visible("x" * 99) == "x" * MOST + "…"


def test_the_heat_map_has_a_cell_for_each_tensor_of_each_case() -> None:
    report = made.report(
        made.case("prefill", logits=0.34), made.case("prefill", "growing"), made.case("decode", key=12.0)
    )
    static, growing = heat_maps(report)
    assert (static.layout, static.cases) == ("static", [(1, "prefill"), (3, "decode")])
    assert [name for name, _ in static.rows] == ["logits", "0.key", "0.value", "1.key", "1.value"]
    cells = [[(cell.text, cell.level) for cell in cells if cell] for _, cells in static.rows]
    assert cells[0] == [("34", "l3"), ("30", "l3")]
    assert cells[1] == [("20", "l2"), ("≫", "over")]
    assert growing.cases == [(2, "prefill")]


def test_what_fails_is_unfolded_but_not_all_of_it() -> None:
    good = report_html(made.report(*(made.case(f"c{number}") for number in range(9))))
    bad = report_html(made.report(*(made.case(f"c{number}", key=2.0) for number in range(9))))
    assert (good.count("<details open>"), bad.count("<details open>")) == (0, 4)


def test_pictures_stay_within_their_frame() -> None:
    many = Positions(*((tuple(range(500)),) * 6), tuple(10.0 ** (number % 30 - 20) for number in range(500)))
    odd = replace(many, error=(0.0, math.inf, *many.error[2:]))
    sample = Sample((0.0, 1e9, -1e9), (1.0, 1e9, -1e9), tuple(range(40)), 0, 780)
    empty = Sample((), (), (0,) * 40, 8, 8)
    for picture in (
        error_by_position(odd, 1e-5),
        error_by_position(many, 0.0),
        histogram(sample, 1e-3),
        histogram(sample, 0.0),
        histogram(empty, 1e-3),
        scatter(sample),
        scatter(empty),
    ):
        numbers = [float(found) for found in re.findall(r' (?:x|x1|x2|cx)="([^"]+)"', picture)]
        heights = [float(found) for found in re.findall(r' (?:y|y1|y2|cy|height)="([^"]+)"', picture)]
        assert all(0 <= number <= 360 for number in numbers)
        assert all(0 <= number <= 170 for number in heights)


def test_the_command_writes_a_small_page(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(tiny_bundle), "--layout", "growing", "--greedy-steps", "4"]
    assert run_command([*arguments, "--html", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    reader = check_alone(page)
    assert len(page.encode()) < 3_000_000
    assert "score" in reader.words, "the text that the natural case is made of"
    assert f"doge-deploy verify {tiny_bundle} --layout growing --greedy-steps 4" in reader.words
