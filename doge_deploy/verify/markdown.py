"""A report in Markdown, for the summary of a CI job and for the failure of a test."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from doge_deploy.errors import UsageError
from doge_deploy.verify.files import write_text
from doge_deploy.verify.parity import CaseResult
from doge_deploy.verify.report import Report
from doge_deploy.verify.tolerance import share_text

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
"""Names the file to which every command of a step appends what its page should show."""

MOST_FAILURES = 20
"""Failures that are said; a job's summary may have one megabyte."""

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")


def report_markdown(report: Report) -> str:
    """The verdict, a table of the cases, and what failed, in words."""
    parts = [
        f"### {'✅' if report.passed else '❌'} {_escaped(report.bundle.name)} {_escaped(report.verdict)}",
        table(report.results),
        *_section("Failures", _failures(report)),
        *_section("Where it begins", report.localized),
        *_section("Not judged", (f"{name}: {reason}" for name, reason in report.skipped.items())),
        _ground(report),
    ]
    if report.command:
        parts.append(f"```\n{report.command}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def table(results: Iterable[CaseResult]) -> str:
    """A row a case."""
    lines = [
        "| | layout | case | logits max \\|d\\| | tolerance used | by | top-1 | selections |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | --- |",
    ]
    for result in results:
        tied = f", {result.tied_rows} tied" if result.tied_rows else ""
        cells = (
            "ok" if result.passed else "**FAIL**",
            result.layout,
            result.case,
            f"{result.logits.difference.max_abs:.1e}",
            share_text(result.load),
            f"`{result.worst.name}`",
            f"{result.top1.agreeing}/{result.top1.total}" if result.top1.total else "",
            f"{result.selected}{tied}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def write_markdown(report: Report, path: Path) -> None:
    """Write it; where `path` is the summary of a job, which other commands write too, append it.

    Raises:
        UsageError: the file cannot be written.
    """
    summary = os.environ.get(SUMMARY_VARIABLE)
    if not summary or path.absolute() != Path(summary).absolute():
        write_text(path, report_markdown(report))
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(report_markdown(report) + "\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def _failures(report: Report) -> Sequence[str]:
    found = [f"weights: {failure}" for failure in report.weights.failures]
    found += [f"{result.layout}/{result.case}: {failure}" for result in report.results for failure in result.failures]
    found += [f"{result.layout}/quality: {failure}" for result in report.quality for failure in result.failures]
    if report.baseline is not None:
        found += [f"baseline {report.baseline.name}: {drift}" for drift in report.baseline.drifts]
    more = len(found) - MOST_FAILURES
    return [*found[:MOST_FAILURES], *([f"and {more} more"] if more > 0 else [])]


def _section(title: str, lines: Iterable[str]) -> list[str]:
    entries = [f"- {_escaped(line)}" for line in lines]
    return [f"**{title}**", "\n".join(entries)] if entries else []


def _ground(report: Report) -> str:
    """What the verdict stands on."""
    ran = ", ".join(f"{file} ({layout})" for layout, file in report.graphs.items())
    same = "" if report.weights.passed else "NOT "
    words = f"{report.dtype}; ran {ran}; {report.weights.compared} weights {same}bit for bit the checkpoint's"
    if report.recording:
        words += f"; judged by {report.recording}"
    if report.baseline is not None:
        words += f"; {report.baseline.compared} cases compared with {report.baseline.name}"
    if report.environment is not None:
        versions = ", ".join(f"{name} {version}" for name, version in report.environment.packages.items())
        words += f"; doge-deploy {report.environment.doge_deploy}, {versions}"
    return _escaped(words)


def _escaped(text: str) -> str:
    """Without line breaks, and nothing in it is Markdown or HTML."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
