"""The table that `verify` prints, row by row as cases are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from doge_deploy.verify.baseline import Comparison
    from doge_deploy.verify.parity import CaseResult, Quantity
    from doge_deploy.verify.quality import QualityResult
    from doge_deploy.verify.report import Report

_WIDTH_WITHOUT_TERMINAL = 170
_FAILURES_SHOWN = 3


@dataclass(frozen=True)
class _Column:
    name: str
    text: Callable[[CaseResult], str | Text]
    number: bool = True
    from_width: int = 0
    """Characters that a terminal must have to see it; the JSON report has everything."""


_COLUMNS = (
    _Column("layout", lambda result: result.layout, number=False),
    _Column("case", lambda result: result.case, number=False),
    _Column("logits max |d|", lambda result: f"{result.logits.difference.max_abs:.1e}"),
    _Column("of allowed", lambda result: f"{result.logits.load:.0%}"),
    _Column("rel", lambda result: f"{result.logits.difference.max_rel:.1e}", from_width=145),
    _Column("1-cos", lambda result: f"{1 - result.logits.difference.cosine:.0e}", from_width=145),
    _Column("KL", lambda result: f"{result.kl:.0e}", from_width=145),
    _Column("top-1", lambda result: f"{result.top1.agreeing}/{result.top1.total}"),
    _Column("worst cache", lambda result: _cache(result.worst_cache)[0], from_width=120),
    _Column("of allowed", lambda result: _cache(result.worst_cache)[1], from_width=120),
    _Column("selections", lambda result: _selections(result), number=False, from_width=95),
    _Column("", lambda result: Text("ok", "green") if result.passed else Text("FAIL", "bold red"), number=False),
)


class VerifyTable:
    """Live on a terminal, printed once when done elsewhere; a context manager."""

    def __init__(self, reference: str = "transformers in eager mode") -> None:
        console = Console()
        self.console = console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)
        self.errors = Console(stderr=True)
        self.columns = [column for column in _COLUMNS if self.console.width >= column.from_width]
        self.table = Table(title=f"Bundle against {reference}", title_justify="left")
        for column in self.columns:
            width = None if column.name else 4  # the verdict is never cut
            self.table.add_column(
                column.name, justify="right" if column.number else "left", no_wrap=True, min_width=width
            )
        self.live = Live(self.table, console=self.console, auto_refresh=False)

    def __enter__(self) -> VerifyTable:
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.table.rows:
            self.live.update(Text(""))
        self.live.__exit__(kind, error, trace)

    def started(self, what: str) -> None:
        """Told what is about to be done."""
        if not self.console.is_terminal:
            self.errors.print(f"{what} ...", highlight=False)

    def finished(self, result: CaseResult) -> None:
        """Add the row of a judged case."""
        self.table.add_row(*(column.text(result) for column in self.columns))
        self.live.refresh()

    def _say_failures(self, name: str, failures: Sequence[str]) -> None:
        """The first few in words; the JSON report has all."""
        for failure in failures[:_FAILURES_SHOWN]:
            self.console.print(f"FAIL {name}: {failure}", style="red", highlight=False, soft_wrap=True)
        if len(failures) > _FAILURES_SHOWN:
            self.console.print(f"FAIL {name}: and {len(failures) - _FAILURES_SHOWN} more", style="red", highlight=False)

    def summary(self, report: Report) -> None:
        """What is not a row: failures in words, what could not be reached, the reference against itself."""
        say = self.console.print
        if not self.console.is_terminal:
            say()  # the table ends without a line break there
        self._say_failures("weights", report.weights.failures)
        for result in report.results:
            self._say_failures(f"{result.layout}/{result.case}", result.failures)
        for quality in report.quality:
            say(_quality(quality, report), highlight=False, soft_wrap=True)
            self._say_failures(f"{quality.layout}/quality", quality.failures)
        if report.baseline is not None:
            self._say_baseline(report.baseline)
        for case, reason in report.skipped.items():
            say(f"not reachable: {case}: {reason}", highlight=False, soft_wrap=True)
        itself = report.reference_itself
        if itself is not None:
            say(
                f"{report.reference} against itself, prefill against decode: "
                f"max |d| {itself.prefill_against_decode:.1e} of {itself.scale:.1f}"
                + (_mixing(report) if report.routing else ""),
                highlight=False,
                soft_wrap=True,
            )
        if report.recording is not None:
            say(f"judged by the recording {report.recording}", highlight=False, soft_wrap=True)
        ran = ", ".join(f"{file} ({layout})" for layout, file in report.graphs.items())
        say(f"graphs that were run: {ran}", highlight=False, soft_wrap=True)
        passed = sum(result.passed for result in report.results)
        tied = sum(result.tied_rows for result in report.results)
        say(
            f"{report.weights.compared} weights {'' if report.weights.passed else 'NOT '}bit for bit the checkpoint's; "
            f"{passed} of {len(report.results)} cases within tolerance{_greedy(report)}; "
            f"{tied} rows had tied or nearly tied scores",
            highlight=False,
            soft_wrap=True,
        )

    def _say_baseline(self, baseline: Comparison) -> None:
        for drift in baseline.drifts:
            self.console.print(f"DRIFT {drift}", style="red", highlight=False, soft_wrap=True)
        held = f"{baseline.compared} cases compared with {baseline.name}, {len(baseline.drifts)} drift"
        for what, names in (("not judged now", baseline.missing), ("not in it", baseline.new)):
            held += f"; {what}: {', '.join(names)}" if names else ""
        self.console.print(held, highlight=False, soft_wrap=True)


def _quality(result: QualityResult, report: Report) -> str:
    sure = "" if result.sure_top1 is None else f", {result.sure_top1:.1%} of the {result.sure} where it is sure"
    what = "quantized weights"
    if result.emulated:
        what += " and rounded inputs of products as in an engine, emulated"
    return (
        f"{what}, {report.graphs[result.layout]} ({result.layout}), {result.tokens} tokens of held-out text"
        f": KL {result.mean_kl:.2g} (max {result.max_kl:.2g}), top-1 {result.top1:.1%}{sure}, perplexity "
        f"{result.perplexity:.2f} (reference {result.reference_perplexity:.2f})"
    )


def _cache(quantity: Quantity | None) -> tuple[str, str]:
    return ("", "") if quantity is None else (quantity.name.removeprefix("present."), f"{quantity.load:.0%}")


def _selections(result: CaseResult) -> str:
    if not result.selected:
        return ""
    return f"{result.selected}, {result.tied_rows} tied" if result.tied_rows else result.selected


def _mixing(report: Report) -> str:
    return f" (its routing mixes the tokens of a call; this bundle routes as '{report.routing}')"


def _greedy(report: Report) -> str:
    from doge_deploy.verify.cases import GREEDY

    rows = [result for result in report.results if result.case == GREEDY]
    return f"; greedy tokens equal: {', '.join(_greedy_row(row) for row in rows)}" if rows else ""


def _greedy_row(row: CaseResult) -> str:
    margin, explained = row.top1.margin, 2 * row.logits.limit.max_abs
    note = "" if margin is None else f", margin {margin:.1e} where noise explains {explained:.1e}"
    return f"{row.top1.agreeing}/{row.top1.total} ({row.layout}{note})"
