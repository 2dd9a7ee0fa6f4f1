"""What `bench` prints: a table per workload, ratios below it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from doge_deploy.bench.report import (
    NOTABLE_NEIGHBOURS,
    Measurements,
    Ratio,
    Report,
    WorkloadResult,
    bandwidths,
    bundles,
    compared,
    equal_tokens,
    figures,
    neighbours,
    product_rates,
    ratios,
    same_model,
)

if TYPE_CHECKING:
    from rich.status import Status

_WIDTH_WITHOUT_TERMINAL = 150

Figures = dict[str, Any]


@dataclass(frozen=True)
class _Column:
    name: str
    text: Callable[[Figures], str]


_COLUMNS = (
    _Column("first token ms", lambda row: _spread(row["first_token_ms"])),
    _Column("prefill tok/s", lambda row: _number(row["prefill_tokens_per_s"])),
    _Column("decode tok/s", lambda row: _number(row["decode_tokens_per_s"])),
    _Column("ms a step", lambda row: _spread(row["decode_step_ms"])),
    _Column("n", lambda row: str(row["decode_step_ms"]["n"])),
    _Column("load ms", lambda row: _number(row.get("load_ms"))),
    _Column("process to first token s", lambda row: _seconds(row.get("process_to_first_token_ms"))),
    _Column("peak MB (over libraries)", lambda row: _memory(row)),
)


class BenchTables:
    """Says on standard error what is going on, and prints each workload when it is done; a context manager."""

    def __init__(self) -> None:
        console = Console()
        self.console = console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)
        self.errors = Console(stderr=True)
        self._status: Status | None = None
        self._any = False

    def __enter__(self) -> BenchTables:
        if self.errors.is_terminal:
            self._status = self.errors.status("open bundles")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def started(self, what: str) -> None:
        """Told what is about to be done."""
        if self._status is not None:
            self._status.update(what)

    def finished(self, report: Report, result: WorkloadResult) -> None:
        """Print one workload."""
        if not self._any:
            self._print(_conditions(report))
            for name, reason in report.left_out.items():
                self._print(f"{name} is left out: {reason}")
            self._any = True
        self._print("")
        self.console.print(_table(result))
        for line in _notes(report, result):
            self._print(line)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _conditions(report: Report) -> str:
    machine, settings = report.machine, report.settings
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    dtypes = ", ".join(f"{candidate.name} {candidate.dtype}" for candidate in report.candidates)
    return (
        f"{machine.processor}, {machine.cpus} CPUs, {settings.threads} threads each; {machine.system}\n{versions}\n"
        f"computing in: {dtypes}"
    )


def _table(result: WorkloadResult) -> Table:
    steps = result.workload.decode_lengths
    title = f"{result.workload.name}; decode over {steps.start} to {steps.stop - 1} keys; medians (p90)"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in _COLUMNS:
        table.add_column(column.name, justify="right")
    for found in result.measurements:
        row = figures(result, found)
        table.add_row(found.candidate, *(column.text(row) if row else "" for column in _COLUMNS))
    return table


def _notes(report: Report, result: WorkloadResult) -> list[str]:
    lines = [f"{found.candidate}: {found.not_measured}" for found in result.measurements if found.not_measured]
    for own, other in compared(report):
        mine, theirs = result.of(own), result.of(other)
        if mine.rounds and theirs.rounds:
            lines.append(_ratio_line(report, own, other, mine, theirs))
    if result.sweeps_ns:
        measured = [value / 1e9 for value in bandwidths(result)]
        lines.append(
            f"memory bandwidth: {median(measured):.1f} GB/s ({min(measured):.1f} to {max(measured):.1f}), best "
            f"read of a round by {report.settings.threads} threads"
        )
        lines += [_product_line(dtype, *rates) for dtype, rates in product_rates(result).items()]
        lines += [_roofline_line(report, result, found) for found in result.measurements if found.traffic is not None]
    others = neighbours(result)
    if others is None:
        lines.append("other processes: not counted on this system")
    else:
        warning = "; too much to trust these times" if others > NOTABLE_NEIGHBOURS else ""
        lines.append(f"other processes used {others:.1%} of the CPUs during timed rounds{warning}")
        lines += _waiting_lines(report, result, others)
    return lines


_WAITING = 1.4
"""Of the slow steps over the median: beyond it threads waited for one that had no core."""


def _waiting_lines(report: Report, result: WorkloadResult, others: float) -> list[str]:
    """Bundles whose steps stalled while others used the machine: what spinning threads do there."""
    if others <= NOTABLE_NEIGHBOURS or report.settings.threads == 1:
        return []
    own = set(bundles(report))
    lines = []
    for found in result.measurements:
        if found.candidate not in own or not found.rounds:
            continue
        times = figures(result, found)["decode_step_ms"]
        ratio = times["p90"] / times["median"]
        if ratio > _WAITING:
            lines.append(
                f"{found.candidate}: the slowest tenth of the steps took {ratio:.1f} times the median or more: threads "
                "waited, spinning, for one that had no core; compare --spin 0,50 and --threads 1"
            )
    return lines


def _ratio_line(report: Report, own: str, other: str, mine: Measurements, theirs: Measurements) -> str:
    shown = ", ".join(f"{name} {_ratio(value)}" for name, value in ratios(mine, theirs).items())
    if same_model(report, other):
        same, of = equal_tokens(mine, theirs)
        computes = f"likeliest tokens equal: {same}/{of}"
    else:
        computes = "that is another model of this size"
    return f"{own} against {other}, times better: {shown}; {computes}"


def _product_line(dtype: str, library: str, rates: list[float]) -> str:
    spread = f"{min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}"
    return f"matrix products in {dtype}: {median(rates) / 1e9:.0f} G operations/s ({spread}), by {library}"


def _roofline_line(report: Report, result: WorkloadResult, found: Measurements) -> str:
    row = figures(result, found)
    share, nbytes = row["bandwidth_share"], row["decode_step_bytes"]
    line = (
        f"{found.candidate}: a decode step must read {nbytes / 1e6:.1f} MB: "
        f"{share['median']:.0%} of the bandwidth ({share['lowest']:.0%} to {share['highest']:.0%})"
    )
    cache = report.machine.last_level_cache_bytes
    if cache is not None and nbytes < 2 * cache:
        line += f"; much of it stays in the {cache >> 20} MiB cache, so memory is not the limit"
    return line


def _ratio(value: Ratio) -> str:
    return f"{value.of_medians:.2f} ({value.lowest:.2f} to {value.highest:.2f})"


def _spread(times: dict[str, float]) -> str:
    return f"{_number(times['median'])} ({_number(times['p90'])})"


def _number(value: float | None) -> str:
    """Three significant digits, or whole numbers above a hundred."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(ms: float | None) -> str:
    return "" if ms is None else f"{ms / 1000:.2f}"


def _memory(row: Figures) -> str:
    peak, imported = row.get("peak_bytes"), row.get("imported_bytes")
    return "" if peak is None or imported is None else f"{peak / 1e6:.0f} ({(peak - imported) / 1e6:.0f})"
