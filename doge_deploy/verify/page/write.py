"""The page: what the template is given. Everything in it is escaped by the template, pictures by `charts.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from doge_deploy.verify.files import write_text
from doge_deploy.verify.page.charts import error_by_position, histogram, scatter
from doge_deploy.verify.page.tokens import token_texts
from doge_deploy.verify.parity import CaseResult
from doge_deploy.verify.report import Report
from doge_deploy.verify.tolerance import share_text

MOST_OPEN = 4
"""Failed cases that are unfolded; a reader unfolds others."""

AROUND = 5
"""Positions before and after the one that is looked at."""


@dataclass(frozen=True)
class Cell:
    """A tensor of a case in the heat map."""

    load: float

    @property
    def text(self) -> str:
        """Per cent of the tolerance, short."""
        if not math.isfinite(self.load):
            return "∞"
        return f"{self.load:.0%}".rstrip("%") if self.load < 9.995 else "≫"

    @property
    def level(self) -> str:
        """The class of its colour."""
        return "over" if not self.load <= 1 else f"l{min(9, int(self.load * 10))}"


@dataclass(frozen=True)
class HeatMap:
    """How much of the tolerance each tensor of each case of a layout uses."""

    layout: str
    cases: list[tuple[int, str]]
    """Number and name, one a column."""
    rows: list[tuple[str, list[Cell | None]]]
    """Per tensor its name and a cell for each case."""


@dataclass(frozen=True)
class TokenRow:
    """A position, as text."""

    index: int
    token: str
    expected: str
    found: str
    error: float
    looked_at: bool
    same: bool


@dataclass
class CaseView:
    """A case as the page shows it."""

    number: int
    result: CaseResult
    pictures: list[tuple[str, Markup]]
    tokens: list[TokenRow]
    about: str
    """What is in the middle of `tokens`."""
    unfolded: bool = False

    @property
    def name(self) -> str:
        return f"{self.result.layout}/{self.result.case}"

    @property
    def used(self) -> str:
        """Share of the tolerance."""
        return share_text(self.result.load)


def report_html(report: Report, text: Callable[[int], str] = lambda token: "") -> str:
    """The whole page.

    Args:
        report: what is shown.
        text: of a token; empty where it is not known.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cases = [_view(number, result, report.task, text) for number, result in enumerate(report.results, 1)]
    for case in [case for case in cases if not case.result.passed][:MOST_OPEN]:
        case.unfolded = True
    return environment.get_template("report.html").render(
        report=report,
        cases=cases,
        maps=heat_maps(report),
        passed=sum(result.passed for result in report.results),
        tied=sum(result.tied_rows for result in report.results),
        worst=max(cases, key=lambda case: case.result.load, default=None),
    )


def write_html(report: Report, path: Path) -> None:
    """Write the page. Raises UsageError where the file cannot be written."""
    write_text(path, report_html(report, token_texts(report.bundle)))


def heat_maps(report: Report) -> list[HeatMap]:
    """One a layout, its cases numbered as in the report."""
    maps = []
    for layout in dict.fromkeys(result.layout for result in report.results):
        cases = [(number, one) for number, one in enumerate(report.results, 1) if one.layout == layout]
        tensors = list(dict.fromkeys(quantity.name for _, one in cases for quantity in one.quantities))
        loads = [{quantity.name: Cell(quantity.load) for quantity in one.quantities} for _, one in cases]
        rows = [(name.removeprefix("present."), [case.get(name) for case in loads]) for name in tensors]
        maps.append(HeatMap(layout, [(number, one.case) for number, one in cases], rows))
    return maps


def _view(number: int, result: CaseResult, task: str, text: Callable[[int], str]) -> CaseView:
    pictures: list[tuple[str, Markup]] = []
    tokens: list[TokenRow] = []
    about = ""
    allowed = result.logits.limit.max_abs
    if result.positions is not None and result.sample is not None:
        pictures = [
            ("Error by position", error_by_position(result.positions, allowed)),
            ("How large the errors are", histogram(result.sample, allowed)),
            ("Logits", scatter(result.sample)),
        ]
        tokens, about = _tokens(result, task, text)
    return CaseView(number, result, pictures, tokens, about)


def _tokens(result: CaseResult, task: str, text: Callable[[int], str]) -> tuple[list[TokenRow], str]:
    """The positions around the first that diverges, or else around the largest error; within one row of the batch."""
    positions = result.positions
    assert positions is not None
    diverging = positions.first_divergence
    middle = positions.error.index(max(positions.error)) if diverging is None else diverging
    row = [number for number in range(len(positions.error)) if positions.row[number] == positions.row[middle]]
    place = row.index(middle)

    def shown(token: int) -> str:
        words = text(token) if task == "causal-lm" else ""
        return f"{words} ({token})" if words else str(token)

    rows = [
        TokenRow(
            positions.index[number],
            f"{words} ({positions.token[number]})"
            if (words := text(positions.token[number]))
            else str(positions.token[number]),
            shown(positions.expected[number]),
            shown(positions.found[number]),
            positions.error[number],
            number == middle,
            positions.expected[number] == positions.found[number],
        )
        for number in row[max(0, place - AROUND) : place + AROUND + 1]
    ]
    return rows, "the largest error" if diverging is None else "the first other token"
