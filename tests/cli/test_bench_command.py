"""`doge-deploy bench`: options, errors, what it prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from doge_deploy.bench.candidates import Candidate
from doge_deploy.bench.machine import BenchHost
from doge_deploy.bench.measure import RoundTimes
from doge_deploy.bench.report import Load, Measurements, Report, Settings, WorkloadResult
from doge_deploy.bench.workload import Workload
from doge_deploy.cli.main import run_command
from doge_deploy.graph.decode_traffic import Traffic


def test_a_missing_matplotlib_is_told_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_command(["bench", "nowhere", "--plot", str(tmp_path / "x.png")]) == 4
    assert "pip install 'doge-deploy[bench]'" in capfd.readouterr().err


def test_what_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    from doge_deploy.cli.bench_table import BenchTables

    workload = Workload(1, 0, 128, 2)
    found = [
        Measurements(
            name,
            [Load(900_000_000, 1, 100_000_000 * times, 100_000_000, 1, 50_000_000, 1, 150_000_000 * times)],
            [RoundTimes([64_000_000 * times], [2_000_000 * times] * 8 + [slowest * times] * 2, 0.2)],
            [[1], [2]],
        )
        for name, times, slowest in (("doge", 1, 6_000_000), ("transformers", 3, 2_000_000))
    ]
    found[0].traffic = Traffic(59_000_000, 1_000_000)
    llama = Measurements("llama.cpp F32", rounds=[RoundTimes([32_000_000], [1_000_000] * 10, 0.2)], tokens=[[7], [7]])
    found.append(llama)
    products = [{"int8": {"torch": [1_000_000]}}]
    result = WorkloadResult(workload, found, sweeps_ns=[[25_000_000]], products_ns=products, probe_bytes=1_000_000_000)
    candidates = [
        Candidate("doge", "bundle", "b", "float32", 2048, 100),
        Candidate("transformers", "transformers", "c", "float32", 2048, 100),
        Candidate("llama.cpp F32", "llama.cpp", "d", "F32", 2048, 100, same_model=False),
    ]
    machine = BenchHost("Linux", "A processor", 2, 32 << 20, None, {"numpy": "2"})
    report = Report(machine, Settings(2, 1, 1), candidates, [result], {"genai": "it is not here"})
    with BenchTables() as tables:
        tables.finished(report, result)
    printed = capfd.readouterr().out
    for expected in (
        "A processor, 2 CPUs, 2 threads each",
        "prompt 128; decode over 131 to 132 keys",
        "500",  # tokens per second of 2 ms a step
        "2000",  # 128 tokens in 64 ms
        "150 (100)",  # peak, and over libraries
        "doge against transformers, times better: decode 3.00 (3.00 to 3.00)",
        "likeliest tokens equal: 2/2",
        "doge against llama.cpp F32, times better: decode 0.50 (0.50 to 0.50), prefill 0.50 (0.50 to 0.50); that is "
        "another model of this size",
        "genai is left out: it is not here",
        "memory bandwidth: 40.0 GB/s",
        "matrix products in int8: 2147 G operations/s (2147 to 2147), by torch",
        "must read 60.0 MB: 75% of the bandwidth",
        "stays in the 32 MiB cache",
        "other processes used 20.0% of the CPUs during timed rounds; too much",
        "doge: the slowest tenth of the steps took 3.0 times the median or more: threads waited",
    ):
        assert expected in printed
