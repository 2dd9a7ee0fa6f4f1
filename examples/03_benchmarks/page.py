"""Tables and plots of docs/benchmarks.md from the JSON files of `bench`.

The prose of the page is written by hand; what stands between `<!-- NAME -->` and `<!-- end -->` is written here.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rivals import HEADER, machine_line, rivals_rows

Result = dict[str, Any]

DECODE_ROWS = ("20M", "60M", "160M", "20M-MoE")
PREFILL_ROWS = ("20M-prefill", "60M-prefill", "20M-MoE-16384-prefill")
KINDS = ("fp32", "int8", "int4")
BASELINES = ("transformers", "naive")
COLORS = {"transformers": "#9a9a9a", "naive": "#5b8db8", "fp32": "#2f6b3a", "int8": "#d08a2e", "int4": "#b0413e"}
INK, PAPER = "#010203", "#040506"
"""Of the plots: stand-ins for colours that are others on dark pages."""
STYLE = (
    "<style>svg { --ink: #1f2328; --paper: #ffffff } "
    "@media (prefers-color-scheme: dark) { svg { --ink: #d5dae1; --paper: #161b22 } }</style>"
)


def write_page(results: Path, page: Path) -> None:
    """Replace the marked parts of `page` by what the files in `results` say; plots and the files go beside it.

    Paths in the copies are relative to the folder that `results` lies in.
    """
    runs = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    plots = page.parent / page.stem
    plots.mkdir(exist_ok=True)
    for file in results.glob("*.json"):
        (plots / file.name).write_text(file.read_text().replace(f"{results.resolve().parent}/", ""))
    parts: dict[str, Callable[[], str]] = {
        "conditions": lambda: conditions(runs),
        "decode": lambda: decode_table(runs),
        "prefill": lambda: prefill_table(runs),
        "bandwidth": lambda: bandwidth_table(runs),
        "window": lambda: window_table(runs),
        "load": lambda: load_table(runs),
        "rivals": lambda: rivals_part(runs),
        "commands": lambda: commands(runs),
    }
    text = page.read_text(encoding="utf-8")
    for name, make in parts.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"{page} has no part {name!r}")
        body = make()
        text = block.sub(lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")
    plot_rates(runs, DECODE_ROWS, "decode_tokens_per_s", "decode, tokens/s", plots / "decode.svg")
    plot_rates(runs, PREFILL_ROWS, "prefill_tokens_per_s", "prefill of 512, tokens/s", plots / "prefill.svg")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def only(run: Result) -> Result:
    """The one workload of a run."""
    (result,) = run["results"]
    return dict(result)


def row_of(result: Result, candidate: str) -> Result:
    return next((row["figures"] for row in result["measurements"] if row["candidate"] == candidate), {})


def ratio(result: Result, candidate: str, against: str, what: str) -> str:
    for row in result["ratios"]:
        if (row["candidate"], row["against"]) == (candidate, against) and what in row:
            value = row[what]
            return f"{value['of_medians']:.2f} ({value['lowest']:.2f} to {value['highest']:.2f})"
    return ""


def kinds_of(result: Result) -> list[str]:
    names = [row["candidate"] for row in result["measurements"]]
    return [kind for kind in KINDS if kind in names]


def conditions(runs: dict[str, Result]) -> str:
    run = next(run for name, run in runs.items() if name != "generate")
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    noise = ", ".join(
        f"{name} {max(result['neighbours'] for result in run['results']):.1%}"
        for name, run in runs.items()
        if name != "generate"
    )
    return (
        f"- {machine['processor']}, {machine['cpus']} CPUs, {machine['last_level_cache_bytes'] >> 20} MiB of "
        f"last-level cache, {machine['memory_bytes'] / 1e9:.0f} GB of memory\n- {machine['system']}\n- {versions}\n"
        f"- {run['settings']['threads']} threads for every candidate\n"
        f"- share of the CPUs that other processes used during timed rounds: {noise}"
    )


def decode_table(runs: dict[str, Result]) -> str:
    rows = []
    for name in DECODE_ROWS:
        if name not in runs:
            continue
        result = only(runs[name])
        baselines = [number(row_of(result, baseline).get("decode_tokens_per_s")) for baseline in BASELINES]
        for kind in kinds_of(result):
            row = row_of(result, kind)
            step = row["decode_step_ms"]
            rows.append(
                [
                    f"{name} {kind}",
                    number(row["decode_tokens_per_s"]),
                    f"{step['median']:.3f} ({step['p90']:.3f})",
                    str(step["n"]),
                    ratio(result, kind, "transformers", "decode"),
                    ratio(result, kind, "naive", "decode"),
                    " / ".join(baselines),
                ]
            )
    header = [
        "model",
        "tok/s",
        "ms a step (p90)",
        "n",
        "times transformers",
        "times naive",
        "transformers / naive tok/s",
    ]
    return table(header, rows)


def prefill_table(runs: dict[str, Result]) -> str:
    rows = []
    for name in PREFILL_ROWS:
        if name not in runs:
            continue
        result = only(runs[name])
        for kind in kinds_of(result):
            row = row_of(result, kind)
            first = row["first_token_ms"]
            rows.append(
                [
                    f"{name.removesuffix('-prefill')} {kind}",
                    f"{first['median']:.1f} ({first['p90']:.1f})",
                    number(row["prefill_tokens_per_s"]),
                    ratio(result, kind, "transformers", "prefill"),
                    ratio(result, kind, "naive", "prefill"),
                    megabytes(row["peak_bytes"]),
                    megabytes(row_of(result, "transformers")["peak_bytes"]),
                ]
            )
    header = [
        "model",
        "first token ms (p90)",
        "tok/s",
        "times transformers",
        "times naive",
        "peak MB",
        "transformers peak MB",
    ]
    return table(header, rows)


def bandwidth_table(runs: dict[str, Result]) -> str:
    rows = []
    for name in DECODE_ROWS:
        if name not in runs:
            continue
        result = only(runs[name])
        bandwidth = result["bandwidth_bytes_per_s"]
        for kind in kinds_of(result):
            row = row_of(result, kind)
            share = row["bandwidth_share"]
            rows.append(
                [
                    f"{name} {kind}",
                    f"{row['decode_step_bytes'] / 1e6:.1f}",
                    spread(bandwidth, lambda value: f"{value / 1e9:.1f}"),
                    spread(share, lambda value: f"{value:.0%}"),
                ]
            )
    return table(["model", "MB a step must read", "GB/s of this machine", "share reached"], rows)


def window_table(runs: dict[str, Result]) -> str:
    if "20M-w512" not in runs:
        return ""
    rows, medians = [], []
    for result in runs["20M-w512"]["results"]:
        step = row_of(result, "fp32")["decode_step_ms"]
        medians.append(step["median"])
        workload = result["workload"]
        keys = workload["past_length"] + workload["prompt_length"] + 2 + workload["decode_steps"]
        rows.append(
            [
                f"{keys - workload['decode_steps'] + 1} to {keys}",
                f"{step['median']:.3f} ({step['p90']:.3f})",
                str(step["n"]),
            ]
        )
    rows.append(["ratio of medians", f"{medians[-1] / medians[0]:.2f}", ""])
    return table(["keys", "ms a step (p90)", "n"], rows)


def load_table(runs: dict[str, Result]) -> str:
    rows = []
    for name in DECODE_ROWS:
        if name not in runs:
            continue
        result = only(runs[name])
        for candidate in (*kinds_of(result), *BASELINES):
            row = row_of(result, candidate)
            if row:
                rows.append(
                    [
                        f"{name} {candidate}",
                        number(row["load_ms"]),
                        f"{row['process_to_first_token_ms'] / 1000:.2f}",
                        megabytes(row["peak_bytes"]),
                        megabytes(row["peak_bytes"] - row["imported_bytes"]),
                    ]
                )
    text = table(["model", "load ms", "process to first token s", "peak MB", "of it above libraries"], rows)
    if "generate" in runs:
        whole = [
            [
                kind,
                f"{row['median_s']:.3f} ({row['p90_s']:.3f})",
                *("{:.2f} ({:.2f} to {:.2f})".format(*row[over]) for over in ("over_imports", "over_loaded")),
                str(row["n"]),
            ]
            for kind, row in runs["generate"].items()
        ]
        text += (
            "\n\n`generate` of one token from the 20M bundle, the whole process, also over a process that imports "
            "numpy, onnxruntime and tokenizers, and over one that reads the tokenizer and opens the graph with "
            "them:\n\n"
        )
        text += table(["bundle", "s (p90)", "over imports (quartiles)", "over imports and loading", "n"], whole)
    return text


def rivals_part(runs: dict[str, Result]) -> str:
    rows = rivals_rows(runs)
    return f"{machine_line(runs)}\n\n{table(HEADER, rows)}" if rows else ""


def commands(runs: dict[str, Result]) -> str:
    lines = [
        "<!-- not run: time: a quarter of an hour; the figures are of such a run -->",
        "```console",
        *(f"$ python examples/03_benchmarks/matrix.py run build/bench {name}" for name in runs),
        "```",
    ]
    return "\n".join(lines)


def plot_rates(runs: dict[str, Result], names: tuple[str, ...], figure_name: str, title: str, path: Path) -> None:
    """One group of bars a model, on a logarithmic scale: an SVG for light pages and for dark ones."""
    present = [name for name in names if name in runs]
    if not present:
        return
    colors = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    colors |= dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER)
    # without a salt and with a date, the same numbers would make another file
    with matplotlib.rc_context({**colors, "svg.fonttype": "none", "svg.hashsalt": "doge-deploy"}):
        file = io.StringIO()
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure = rates_figure(runs, present, figure_name, title)
        figure.savefig(file, format="svg", metadata=unsaid, bbox_inches="tight", pad_inches=0.12)
    drawn = file.getvalue().replace(INK, "var(--ink)").replace(PAPER, "var(--paper)")
    text = "\n".join(line.rstrip() for line in drawn.splitlines()).replace("<defs>", f"{STYLE}\n <defs>", 1)
    path.write_text(text + "\n", encoding="utf-8")


def rates_figure(runs: dict[str, Result], present: list[str], figure_name: str, title: str) -> Figure:
    """The bars of the runs that are there."""
    candidates = [*BASELINES, *KINDS]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(candidates)
    for place, candidate in enumerate(candidates):
        rates = [row_of(only(runs[name]), candidate).get(figure_name) for name in present]
        xs = [group + (place - 2) * width for group, rate in enumerate(rates) if rate]
        heights = [rate for rate in rates if rate]
        if heights:
            bars = axes.bar(xs, heights, width * 0.92, label=candidate, color=COLORS[candidate])
            axes.bar_label(bars, [number(height) for height in heights], fontsize=7, padding=1)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks(range(len(present)), [name.removesuffix("-prefill") for name in present])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(candidates), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    return figure


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: dict[str, float], text: Callable[[float], str]) -> str:
    return f"{text(values['median'])} ({text(values['lowest'])} to {text(values['highest'])})"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.0f}"
