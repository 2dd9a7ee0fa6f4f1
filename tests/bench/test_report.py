"""Arithmetic of a report, on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from doge_deploy.bench.candidates import Candidate
from doge_deploy.bench.machine import BenchHost
from doge_deploy.bench.measure import RoundTimes
from doge_deploy.bench.products import OPERATIONS
from doge_deploy.bench.report import (
    Load,
    Measurements,
    Ratio,
    Report,
    Settings,
    WorkloadResult,
    compared,
    equal_tokens,
    figures,
    neighbours,
    product_rates,
    ratio,
    ratios,
    roofline_shares,
    summarize,
)
from doge_deploy.bench.workload import Workload
from doge_deploy.graph.decode_traffic import Traffic

WORKLOAD = Workload(batch_size=2, past_length=0, prompt_length=100, decode_steps=2)


def load(load_ns: int, peak_bytes: int | None) -> Load:
    return Load(50 + load_ns, 40, load_ns, 30, 20, 100, 200, peak_bytes)


def test_median_and_percentile() -> None:
    times = summarize([5, 1, 4, 2, 3, 6, 7, 8, 9, 10, 11])
    assert (times.median_ns, times.p90_ns, times.n) == (6, 10, 11)
    assert times.per_second(3) == 5e8


def test_no_times_are_no_figure() -> None:
    with pytest.raises(ValueError):
        summarize([])


def test_a_ratio_is_one_of_medians_with_the_spread_of_its_rounds() -> None:
    own, other = [[1, 2, 3], [2, 2, 2]], [[4, 4, 100], [12, 8, 10]]
    assert ratio(own, other) == Ratio(of_medians=9 / 2, lowest=4 / 2, highest=10 / 2)


@pytest.mark.parametrize(("own", "other"), [([[1.0]], [[1.0], [1.0]]), ([], [])], ids=["unequal", "none"])
def test_no_ratio_of_different_runs(own: list[list[float]], other: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="same rounds of one run"):
        ratio(own, other)


def test_ratios_are_of_what_both_were_measured_on() -> None:
    own = Measurements("own", [load(10, 100)], [RoundTimes([10], [1, 1], None)])
    other = Measurements("other", [load(30, None)], [RoundTimes([20], [5, 5], None)])
    found = ratios(own, other)
    assert {name: value.of_medians for name, value in found.items()} == {
        "decode": 5,
        "prefill": 2,
        "load": 3,
        "first token of a new process": (50 + 30 + 30) / (50 + 10 + 30),
    }


def test_tokens_per_second_count_the_whole_batch() -> None:
    found = Measurements("own", [load(10_000_000, 7)], [RoundTimes([1_000_000], [500_000, 500_000], None)])
    row = figures(WorkloadResult(WORKLOAD, [found]), found)
    assert row["prefill_tokens_per_s"] == pytest.approx(2 * 100 / 1e-3)
    assert row["decode_tokens_per_s"] == pytest.approx(2 / 0.5e-3)
    assert row["decode_step_ms"] == {"median": 0.5, "p90": 0.5, "n": 2}
    assert row["load_ms"] == 10


def test_the_share_of_the_roofline_is_taken_within_a_round() -> None:
    found = Measurements("own", [], [RoundTimes([1], [10, 10], None), RoundTimes([1], [20, 20], None)])
    found.traffic = Traffic(weight_bytes=60, cache_bytes=20)
    result = WorkloadResult(WORKLOAD, [found], sweeps_ns=[[300, 100], [50, 60]], probe_bytes=1000)
    # 80 bytes in 10 ns is 8 GB/s of 10 GB/s, the best of the round; then 4 GB/s of 20 GB/s
    assert roofline_shares(result, found) == pytest.approx([0.8, 0.2])


def test_no_roofline_without_a_probe() -> None:
    found = Measurements("own", [], [RoundTimes([1], [10], None)], traffic=Traffic(1, 1))
    assert roofline_shares(WorkloadResult(WORKLOAD, [found]), found) is None


def test_equal_tokens_and_neighbours() -> None:
    a = Measurements("a", rounds=[RoundTimes([1], [1], 0.02)], tokens=[[1, 2], [3, 4]])
    b = Measurements("b", rounds=[RoundTimes([1], [1], 0.04)], tokens=[[1, 2], [3, 5]])
    assert equal_tokens(a, b) == (3, 4)
    assert neighbours(WorkloadResult(WORKLOAD, [a, b])) == pytest.approx(0.03)


def test_names_say_what_is_not_usual() -> None:
    assert Workload(1, 0, 128, 32).name == "prompt 128"
    assert Workload(4, 512, 128, 32).name == "batch 4, past 512, prompt 128"


def test_a_baseline_of_some_weights_stands_beside_bundles_of_these() -> None:
    candidates = [
        Candidate("fp32", "bundle", "a", "float32", 9, 9, weights="fp32"),
        Candidate("int8", "bundle", "b", "float32", 9, 9, weights="int8"),
        Candidate("transformers", "transformers", "c", "float32", 9, 9),
        Candidate("Q8_0", "llama.cpp", "d", "Q8_0", 9, 9, weights="int8"),
    ]
    machine = BenchHost("Linux", "A processor", 2, None, None, {})
    assert compared(Report(machine, Settings(1, 1, 1), candidates)) == [
        ("fp32", "transformers"),
        ("int8", "transformers"),
        ("int8", "Q8_0"),
        ("int8", "fp32"),
    ]


def test_the_fastest_library_says_what_the_machine_multiplies() -> None:
    rounds = [
        {"float32": {"numpy": [100, 50], "torch": [40, 80]}, "int8": {"torch": [10]}},
        {"float32": {"numpy": [20, 60], "torch": [40, 50]}, "int8": {"torch": [5]}},
        {"float32": {"numpy": [90, 50], "torch": [30, 90]}, "int8": {"torch": [20]}},
    ]
    found = product_rates(WorkloadResult(WORKLOAD, products_ns=rounds))
    assert found["float32"] == ("torch", [pytest.approx(OPERATIONS * 1e9 / ns) for ns in (40, 40, 30)])
    assert found["int8"] == ("torch", [pytest.approx(OPERATIONS * 1e9 / ns) for ns in (10, 5, 20)])
    assert product_rates(WorkloadResult(WORKLOAD)) == {}
