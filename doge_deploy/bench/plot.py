"""A PNG of a report: one panel a figure, one group of bars a workload."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from doge_deploy.bench.report import Report, figures
from doge_deploy.errors import MissingDependencyError, UsageError

_PANELS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "decode, tokens/s": lambda row: row["decode_tokens_per_s"],
    "prefill, tokens/s": lambda row: row["prefill_tokens_per_s"],
    "new process to first token, s": lambda row: _scaled(row.get("process_to_first_token_ms"), 1e3),
    "peak memory, MB": lambda row: _scaled(row.get("peak_bytes"), 1e6),
}


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def require_matplotlib() -> None:
    """Raises MissingDependencyError where there is no matplotlib: told before the work rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("--plot needs matplotlib: pip install 'doge-deploy[bench]'")


def plot(report: Report, path: Path) -> None:
    """Draw `report` to the PNG `path`.

    Raises:
        UsageError: it cannot be written.
    """
    from matplotlib.figure import Figure

    names = [candidate.name for candidate in report.candidates]
    width = 0.8 / len(names)
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (title, value) in zip(panels, _PANELS.items(), strict=True):
        for place, name in enumerate(names):
            heights = []
            for result in report.results:
                row = figures(result, result.of(name))
                heights.append((value(row) if row else None) or 0.0)
            xs = [group + (place - (len(names) - 1) / 2) * width for group in range(len(heights))]
            bars = axes.bar(xs, heights, width * 0.92, label=name)
            axes.bar_label(bars, [f"{height:.3g}" if height else "" for height in heights], fontsize=7, padding=1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xticks(range(len(report.results)), [result.workload.name for result in report.results], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    machine = report.machine
    figure.supxlabel(f"{machine.processor}, {report.settings.threads} threads; medians", fontsize=8)
    aside = path.with_name(f".{path.name}.partial.png")
    try:
        figure.savefig(aside, dpi=150)
        aside.rename(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
