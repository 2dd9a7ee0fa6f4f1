"""The tables of results in README.md, from the JSON files beside docs/benchmarks.md.

    python examples/03_benchmarks/readme.py          # writes it

A test fails where README.md has another table than the files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from page import BASELINES, DECODE_ROWS, kinds_of, number, only, ratio, row_of, table
from rivals import HEADER, rivals_rows

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "benchmarks"

YARDSTICK = "llama.cpp"
COLUMNS = ("bundle", "against", "decode", "prefill of 512", "8 rows")


def results(folder: Path) -> str:
    """The machine and the table, in Markdown."""
    runs = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in DECODE_ROWS}
    machine = next(iter(runs.values()))["machine"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("onnxruntime", "torch", "transformers"))
    rows = []
    for name, run in runs.items():
        result = only(run)
        for kind in kinds_of(result):
            figures = row_of(result, kind)
            plain, eager = (ratio(result, kind, against, "decode") for against in reversed(BASELINES))
            rows.append([f"{name} {kind}", number(figures["decode_tokens_per_s"]), plain, eager])
    header = ["", "tokens/s", "times a plain `torch.onnx.export`, fp32", "times transformers in eager mode, fp32"]
    return f"{machine['processor']}, {machine['cpus']} cores; {versions}.\n\n{table(header, rows)}"


def yardstick(folder: Path) -> str:
    """Bundles beside llama.cpp, in Markdown."""
    runs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*-rivals*.json"))}
    rows = [dict(zip(HEADER, row, strict=True)) for row in rivals_rows(runs)]
    lines = [[row[column] for column in COLUMNS] for row in rows if row["against"].startswith(YARDSTICK)]
    return table(list(COLUMNS), lines)


def renewed(text: str, folder: Path = RESULTS) -> str:
    """The text of README.md with the tables as the files have them."""
    for name, make in (("results", results), (YARDSTICK, yardstick)):
        part = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert part.search(text), name
        body = make(folder)
        text = part.sub(lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text)
    return text


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
