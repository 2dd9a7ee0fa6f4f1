"""examples/03_benchmarks: rows that exist, and a page that is made of JSON files alone."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from doge_deploy.bench.candidates import Candidate
from doge_deploy.bench.machine import BenchHost
from doge_deploy.bench.measure import RoundTimes
from doge_deploy.bench.report import Load, Measurements, Report, Settings, WorkloadResult, to_json
from doge_deploy.bench.workload import Workload
from doge_deploy.cli.bench import bench
from doge_deploy.cli.export import export
from doge_deploy.graph.decode_traffic import Traffic

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "03_benchmarks"


def load(name: str) -> ModuleType:
    """A script of the example as a module; they import each other by name."""
    for needed in {"page": ["rivals"], "matrix": ["page"], "readme": ["page"]}.get(name, []):
        load(needed)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def a_run(name: str) -> dict[str, object]:
    """A report in which bundles take 2 ms and baselines 6 ms a step."""
    names = {"fp32": "bundle", "transformers": "transformers", "naive": "naive"}
    results = []
    if "rivals" in name:
        names["llama.cpp F32"] = "llama.cpp"
    pasts = (0, 7168) if name.endswith("w512") else (0,)
    prompts = (128, 512) if name.endswith("rivals") else (128,)
    for past, prompt in [(past, prompt) for past in pasts for prompt in prompts]:
        found = []
        for candidate, kind in names.items():
            step = 2_000_000 if kind == "bundle" else 6_000_000
            row = Measurements(candidate, [Load(9, 1, 2, 3, 4, 10**6, 2 * 10**6, 3 * 10**6)])
            row.rounds, row.tokens = [RoundTimes([step * 10], [step] * 2, 0.01)] * 2, [[1]]
            row.traffic = Traffic(10**6, 10**6) if kind == "bundle" else None
            found.append(row)
        products = [{"int8": {"torch": [10**6]}}] * 2
        results.append(WorkloadResult(Workload(1, past, prompt, 2), found, [[10**6]] * 2, 10**7, products))
    candidates = [Candidate(candidate, kind, "", "float32", 2048, 9) for candidate, kind in names.items()]
    machine = BenchHost("Linux", "A processor", 2, 1 << 25, 1 << 34, {"numpy": "2"})
    return to_json(Report(machine, Settings(2, 2, 1), candidates, results))


def test_the_page_is_made_of_the_files_alone(tmp_path: Path) -> None:
    matrix = load("matrix")
    page = sys.modules["page"]
    results = tmp_path / "results"
    results.mkdir()
    for name in matrix.ROWS:
        (results / f"{name}.json").write_text(json.dumps({**a_run(name), "path": str(tmp_path / "bundles" / name)}))
    (results / "generate.json").write_text(
        json.dumps(
            {
                "int4": {
                    "median_s": 0.5,
                    "p90_s": 0.6,
                    "over_imports": [2.0, 1.9, 2.1],
                    "over_loaded": [1.5, 1.4, 1.6],
                    "n": 20,
                }
            }
        )
    )
    target = tmp_path / "benchmarks.md"
    shutil.copyfile(ROOT / "docs" / "benchmarks.md", target)
    page.write_page(results, target)
    text = target.read_text()
    assert "| 20M fp32 | 500 | 2.000 (2.000) | 4 | 3.00 (3.00 to 3.00) |" in text
    assert (
        "A processor, 2 CPUs" in text
        and "| int4 | 0.500 (0.600) | 2.00 (1.90 to 2.10) | 1.50 (1.40 to 1.60) | 20 |" in text
    )
    three = "3.00 (3.00 to 3.00)"
    assert f"| 20M fp32 | llama.cpp F32 | {three} | {three} | 2e-06 / 2e-06 | 3 / 3 | {three} |" in text
    assert "- 60M: 10 (10 to 10) GB/s, 2147 (2147 to 2147) G operations/s of products in int8 (torch)" in text
    assert (tmp_path / "benchmarks" / "decode.svg").is_file() and (tmp_path / "benchmarks" / "prefill.svg").is_file()
    assert json.loads((tmp_path / "benchmarks" / "20M.json").read_text())["path"] == "bundles/20M"
    page.write_page(results, target)
    assert target.read_text() == text, "made twice is made once"


def test_the_results_in_the_readme_are_those_of_the_files() -> None:
    load("page")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert load("readme").renewed(text) == text, "stale: python examples/03_benchmarks/readme.py"


def test_what_is_published_has_no_path_of_a_machine() -> None:
    for file in (ROOT / "docs").glob("benchmarks*/*.json"):
        assert not re.search(r'"/[a-z]', file.read_text()), file.name


def test_options_of_rows_are_options_of_the_commands() -> None:
    matrix = load("matrix")
    for row in matrix.ROWS.values():
        bench.make_context("bench", ["x", *row.bench])
        for kind in row.kinds:
            export.make_context("export", ["x", "-o", "y", *matrix.QUANTIZATIONS[kind]])


def test_make_random_knows_the_options_of_rows(tmp_path: Path) -> None:
    matrix = load("matrix")
    directory = ROOT / "examples" / "02_published_sizes"
    spec = importlib.util.spec_from_file_location("make_random", directory / "make_random.py")
    assert spec is not None and spec.loader is not None
    make_random = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_random)
    for row in matrix.ROWS.values():
        make_random.main.make_context("x", [row.checkpoint[0], str(tmp_path), *row.checkpoint[1:]])


@pytest.mark.parametrize("row", ["7B"])
def test_a_row_that_does_not_exist_is_refused(row: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(load("matrix").cli, ["run", str(tmp_path), row])
    assert result.exit_code == 2 and "is not one of" in result.output


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("as it was")
    result = CliRunner().invoke(load("matrix").cli, ["page", str(tmp_path), str(page)])
    assert result.exit_code == 2 and "has no results of a row" in result.output
    assert page.read_text() == "as it was"
