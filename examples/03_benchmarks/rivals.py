"""The table of docs/benchmarks.md that holds bundles against what else people run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]

HEADER = ["bundle", "against", "decode", "prefill of 512", "load ms", "peak MB", "8 rows"]


def rivals_rows(runs: dict[str, Result]) -> list[list[str]]:
    """A line for each bundle and rival. Ratios are the other's over the bundle's, above 1 the bundle is better; of load
    and memory both figures are given, the bundle's first.
    """
    lines = []
    for name, run in runs.items():
        if not name.endswith("-rivals"):
            continue
        short, long = (_with_prompt(run, length) for length in (128, 512))
        batch = runs.get(f"{name}-8", {"results": [{"ratios": []}]})["results"][0]
        for pair in short["ratios"]:
            own, other = pair["candidate"], pair["against"]
            if other in _bundles(run):
                continue
            lines.append(
                [
                    f"{name.removesuffix('-rivals')} {own}",
                    other,
                    _ratio(pair, "decode"),
                    _ratio(_pair(long, own, other), "prefill"),
                    _both(short, own, other, "load_ms", lambda value: f"{value:.3g}"),
                    _both(long, own, other, "peak_bytes", lambda value: f"{value / 1e6:.0f}"),
                    _ratio(_pair(batch, own, other), "decode"),
                ]
            )
    return lines


def machine_line(runs: dict[str, Result]) -> str:
    """Memory bandwidth and matrix products of the machine, as measured in the rounds of those runs."""
    parts = []
    for name, run in runs.items():
        if name.endswith("-rivals"):
            result = _with_prompt(run, 128)
            found = [f"{_spread(result['bandwidth_bytes_per_s'])} GB/s"]
            for dtype, rates in result["products_per_s"].items():
                found.append(f"{_spread(rates)} G operations/s of products in {dtype} ({rates['library']})")
            parts.append(f"- {name.removesuffix('-rivals')}: {', '.join(found)}")
    return "\n".join(parts)


def _with_prompt(run: Result, length: int) -> Result:
    return next(result for result in run["results"] if result["workload"]["prompt_length"] == length)


def _bundles(run: Result) -> set[str]:
    return {candidate["name"] for candidate in run["candidates"] if candidate["kind"] == "bundle"}


def _pair(result: Result, own: str, other: str) -> Result:
    pairs = [pair for pair in result["ratios"] if (pair["candidate"], pair["against"]) == (own, other)]
    return pairs[0] if pairs else {}


def _ratio(pair: Result, what: str) -> str:
    if what not in pair:
        return ""
    value = pair[what]
    return f"{value['of_medians']:.2f} ({value['lowest']:.2f} to {value['highest']:.2f})"


def _both(result: Result, own: str, other: str, what: str, text: Callable[[float], str]) -> str:
    figures = {row["candidate"]: row["figures"] for row in result["measurements"]}
    return f"{text(figures[own][what])} / {text(figures[other][what])}"


def _spread(value: Result) -> str:
    return f"{value['median'] / 1e9:.0f} ({value['lowest'] / 1e9:.0f} to {value['highest'] / 1e9:.0f})"
