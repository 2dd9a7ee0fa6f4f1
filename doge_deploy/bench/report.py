"""What a benchmark found: raw times, and the figures that are made of them.

Times are nanoseconds, memory is bytes. A figure is a median with its spread, never a mean; a ratio is one of medians
that come from the same rounds, with the smallest and the largest ratio of a single round beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from doge_deploy.bench.candidates import Candidate
from doge_deploy.bench.machine import BenchHost
from doge_deploy.bench.measure import RoundTimes
from doge_deploy.bench.products import OPERATIONS
from doge_deploy.bench.workload import Workload
from doge_deploy.graph.decode_traffic import Traffic

NOTABLE_NEIGHBOURS = 0.05
"""Share of the machine that others may use before the report says so."""


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    threads: int
    rounds: int
    loads: int
    argv: tuple[str, ...] = ()
    """The command line, where there was one."""


@dataclass(frozen=True)
class Load:
    """One fresh process: from its start to its first tokens."""

    ready_ns: int
    """From starting the process to a loaded model: Python, imports, loading."""
    import_ns: int
    load_ns: int
    first_prefill_ns: int
    first_decode_ns: int
    imported_bytes: int | None
    """Resident memory after imports."""
    loaded_bytes: int | None
    peak_bytes: int | None

    @property
    def first_token_ns(self) -> int:
        """From starting the process to the logits of the first token."""
        return self.ready_ns + self.first_prefill_ns


@dataclass
class Measurements:
    """One candidate on one workload."""

    candidate: str
    loads: list[Load] = field(default_factory=list)
    rounds: list[RoundTimes] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    """Likeliest tokens, `[calls, B]`: whether candidates compute the same."""
    traffic: Traffic | None = None
    """Of a bundle: bytes of a decode step in the middle of the timed ones."""
    not_measured: str | None = None
    """Why there is nothing, where it is so."""


@dataclass
class WorkloadResult:
    """All candidates on one workload."""

    workload: Workload
    measurements: list[Measurements] = field(default_factory=list)
    sweeps_ns: list[list[int]] = field(default_factory=list)
    """Per round, what reads of `probe_bytes` took; empty without a roofline."""
    probe_bytes: int = 0
    products_ns: list[dict[str, dict[str, list[int]]]] = field(default_factory=list)
    """Per round, dtype and library, what products of `products.SIZE` took; empty without a roofline."""

    def of(self, candidate: str) -> Measurements:
        return next(found for found in self.measurements if found.candidate == candidate)


@dataclass
class Report:
    """A whole benchmark."""

    machine: BenchHost
    settings: Settings
    candidates: list[Candidate]
    results: list[WorkloadResult] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a baseline that was asked for is none of the candidates, by its name."""


@dataclass(frozen=True)
class Times:
    """Of one kind of call."""

    median_ns: float
    p90_ns: float
    n: int

    def per_second(self, tokens: int) -> float:
        """Tokens per second where a call gives `tokens` of them, from the median."""
        return tokens / self.median_ns * 1e9


@dataclass(frozen=True)
class Ratio:
    """How many times more another one takes: above 1 the own side is better."""

    of_medians: float
    lowest: float
    highest: float
    """Of single rounds (or single processes)."""


def summarize(times: Sequence[float]) -> Times:
    """Median and 90th percentile (linear between neighbours) of calls.

    Raises:
        ValueError: there are none.
    """
    return Times(median(times), float(np.percentile(np.asarray(times, float), 90)), len(times))


def ratio(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Ratio:
    """The ratio of two candidates that were timed in the same rounds, one list of times per round.

    Raises:
        ValueError: they were not.
    """
    if len(own) != len(other) or not own:
        raise ValueError(f"{len(own)} rounds against {len(other)}: a ratio needs the same rounds of one run")
    rounds = [median(b) / median(a) for a, b in zip(own, other, strict=True)]
    return Ratio(_flat_median(other) / _flat_median(own), min(rounds), max(rounds))


def _flat_median(rounds: Sequence[Sequence[float]]) -> float:
    return median([value for times in rounds for value in times])


RATIOS: dict[str, Callable[[Measurements], list[list[float]]]] = {
    "decode": lambda found: [list(times.decode_ns) for times in found.rounds],
    "prefill": lambda found: [list(times.prefill_ns) for times in found.rounds],
    "load": lambda found: [[load.load_ns] for load in found.loads],
    "first token of a new process": lambda found: [[load.first_token_ns] for load in found.loads],
    "peak memory": lambda found: [[load.peak_bytes] for load in found.loads if load.peak_bytes is not None],
}
"""Which figures are compared with each other, each with its samples by round."""


def ratios(own: Measurements, other: Measurements) -> dict[str, Ratio]:
    """Every ratio that both have samples for."""
    return {
        name: ratio(samples(own), samples(other))
        for name, samples in RATIOS.items()
        if samples(own) and len(samples(own)) == len(samples(other))
    }


def bandwidths(result: WorkloadResult) -> list[float]:
    """Bytes per second that the probe reached, one per round: of its best read, the figure that STREAM reports.

    A roofline is what can be reached; whatever disturbs a read makes it look lower and a share look better.
    """
    return [result.probe_bytes / min(sweeps) * 1e9 for sweeps in result.sweeps_ns]


def roofline_shares(result: WorkloadResult, found: Measurements) -> list[float] | None:
    """Share of the memory bandwidth that decode reaches, one per round; None where it was not measured.

    Of a round: bytes that must be read over the median time of a step, over the bandwidth of that round.
    """
    if found.traffic is None or not result.sweeps_ns or not found.rounds:
        return None
    return [
        found.traffic.total_bytes / median(times.decode_ns) * 1e9 / bandwidth
        for bandwidth, times in zip(bandwidths(result), found.rounds, strict=True)
    ]


def equal_tokens(own: Measurements, other: Measurements) -> tuple[int, int]:
    """How many likeliest tokens are the same, of how many."""
    pairs = [
        (a, b) for mine, theirs in zip(own.tokens, other.tokens, strict=True) for a, b in zip(mine, theirs, strict=True)
    ]
    return sum(a == b for a, b in pairs), len(pairs)


def same_model(report: Report, name: str) -> bool:
    """Whether a candidate runs the model of the bundles."""
    return next(candidate.same_model for candidate in report.candidates if candidate.name == name)


def neighbours(result: WorkloadResult) -> float | None:
    """Share of the machine that others used in the timed rounds of a workload."""
    shares = [
        times.neighbours for found in result.measurements for times in found.rounds if times.neighbours is not None
    ]
    return float(np.mean(shares)) if shares else None


def figures(result: WorkloadResult, found: Measurements) -> dict[str, Any]:
    """What is printed and plotted of one candidate, in the units of people."""
    if not found.rounds:
        return {}
    workload = result.workload
    prefill = summarize([time for times in found.rounds for time in times.prefill_ns])
    decode = summarize([time for times in found.rounds for time in times.decode_ns])
    values: dict[str, Any] = {
        "first_token_ms": {"median": prefill.median_ns / 1e6, "p90": prefill.p90_ns / 1e6, "n": prefill.n},
        "prefill_tokens_per_s": prefill.per_second(workload.batch_size * workload.prompt_length),
        "decode_step_ms": {"median": decode.median_ns / 1e6, "p90": decode.p90_ns / 1e6, "n": decode.n},
        "decode_tokens_per_s": decode.per_second(workload.batch_size),
    }
    if found.loads:
        values |= {
            "load_ms": median(load.load_ns for load in found.loads) / 1e6,
            "import_ms": median(load.import_ns for load in found.loads) / 1e6,
            "process_to_first_token_ms": median(load.first_token_ns for load in found.loads) / 1e6,
            "first_prefill_ms": median(load.first_prefill_ns for load in found.loads) / 1e6,
            "first_decode_ms": median(load.first_decode_ns for load in found.loads) / 1e6,
        }
        for name in ("peak_bytes", "loaded_bytes", "imported_bytes"):
            known = [value for load in found.loads if (value := getattr(load, name)) is not None]
            values[name] = median(known) if known else None
    if found.traffic is not None:
        values["decode_step_bytes"] = found.traffic.total_bytes
    if shares := roofline_shares(result, found):
        values["bandwidth_share"] = _spread(shares)
    return values


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def bundles(report: Report) -> list[str]:
    """Names of the candidates that are bundles; the others are baselines."""
    return [candidate.name for candidate in report.candidates if candidate.is_bundle]


def compared(report: Report) -> list[tuple[str, str]]:
    """Which candidates are compared with which: every bundle against baselines, and against the first bundle.

    A baseline may be for bundles of one kind of weights alone.
    """
    own = [candidate for candidate in report.candidates if candidate.is_bundle]
    baselines = [candidate for candidate in report.candidates if not candidate.is_bundle]
    pairs = []
    for one in own:
        fitting = [other for other in baselines if other.weights in (None, one.weights)]
        pairs += [(one.name, other.name) for other in (*fitting, *own[:1]) if other.name != one.name]
    return pairs


def product_rates(result: WorkloadResult) -> dict[str, tuple[str, list[float]]]:
    """By dtype the fastest library, and its multiplications and additions per second, one figure per round: of its best
    product, as for `bandwidths`.
    """
    found: dict[str, tuple[str, list[float]]] = {}
    for dtype in result.products_ns[0] if result.products_ns else ():
        rates = {
            library: [OPERATIONS / min(libraries[dtype][library]) * 1e9 for libraries in result.products_ns]
            for library in result.products_ns[0][dtype]
        }
        best = max(rates, key=lambda library: median(rates[library]))
        found[dtype] = (best, rates[best])
    return found


def to_json(report: Report) -> dict[str, Any]:
    """Raw times and figures, for machines and for plots."""
    data = asdict(report)
    for raw, result in zip(data["results"], report.results, strict=True):
        raw["name"] = result.workload.name
        raw["neighbours"] = neighbours(result)
        if result.sweeps_ns:
            measured = bandwidths(result)
            raw["bandwidth_bytes_per_s"] = {
                "median": median(measured),
                "lowest": min(measured),
                "highest": max(measured),
            }
        raw["products_per_s"] = {
            dtype: {"library": library, **_spread(rates)} for dtype, (library, rates) in product_rates(result).items()
        }
        for row, found in zip(raw["measurements"], result.measurements, strict=True):
            row["figures"] = figures(result, found)
        raw["ratios"] = [
            {
                "candidate": own,
                "against": other,
                "same_model": same_model(report, other),
                "equal_tokens": equal_tokens(result.of(own), result.of(other)),
                **{name: asdict(value) for name, value in ratios(result.of(own), result.of(other)).items()},
            }
            for own, other in compared(report)
            if result.of(own).rounds and result.of(other).rounds
        ]
    return {"format_version": 1, **data}
