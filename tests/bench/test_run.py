"""A whole benchmark: who is asked what in which order, and once for real."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_legacy
import numpy as np
import pytest
from bundles import make_bundle, shared_bundle
from engine_stand_ins import record_of
from sweeps import cases

from doge_deploy.bench import run as bench_run
from doge_deploy.bench.baselines import catalog
from doge_deploy.bench.baselines.eager import EagerRunner, load_model
from doge_deploy.bench.baselines.naive import export_naive
from doge_deploy.bench.baselines.naive import open_runner as open_naive
from doge_deploy.bench.candidates import Candidate
from doge_deploy.bench.files import write_json
from doge_deploy.bench.measure import PREFILLS, time_first_calls
from doge_deploy.bench.opening import import_libraries, open_candidate
from doge_deploy.bench.report import figures, product_rates, ratios, to_json
from doge_deploy.bench.roofline import SWEEPS
from doge_deploy.bench.run import BenchOptions, bench
from doge_deploy.bench.workload import Workload
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.errors import UsageError
from doge_deploy.runtime import backend
from doge_deploy.runtime.base import Runner
from doge_deploy.runtime.ort import open_runner

Asked = tuple[int, str, str]
"""Number of the process, whom it holds, what it was asked."""


class ScriptedProcess:
    """Answers at once, and notes who was asked what and how many processes were alive."""

    log: list[Asked]
    alive: list[int]
    number = 0

    def __init__(self, threads: int) -> None:
        type(self).number += 1
        self.number, self.name = type(self).number, ""

    def __enter__(self) -> ScriptedProcess:
        self.alive.append(self.number)
        return self

    def __exit__(self, *unused: object) -> None:
        self.alive.remove(self.number)

    def age_ns(self) -> int:
        return 100

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        if do == "load":
            self.name = request["candidate"]["name"]
        self.name = "probe" if do == "probe" else self.name
        self.log.append((self.number, self.name, do))
        # what is answered depends on the process and on how often it was asked: ratios of different runs would show
        turn = sum(number == self.number and what == do for number, _, what in self.log)
        return {
            "load": {"import_ns": 1, "load_ns": self.number, "imported_bytes": 1, "loaded_bytes": 2},
            "first": {"prefill_ns": 1000, "decode_ns": 1000, "tokens": [[1], [2]]},
            "round": {"prefill_ns": [turn * 10] * 3, "decode_ns": [turn * self.number] * 2, "neighbours": 0.0},
            "memory": {"peak_bytes": 3 * len(self.alive)},
            "probe": {"nbytes": 1000},
            "sweep": {"sweeps_ns": [turn]},
            "make": {},
            "multiply": {"products_ns": {"float32": {"numpy": [1000 * turn], "torch": [500]}}},
        }[do]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedProcess]:
    ScriptedProcess.log, ScriptedProcess.alive, ScriptedProcess.number = [], [], 0
    monkeypatch.setattr(bench_run, "WorkerProcess", ScriptedProcess)
    monkeypatch.setattr(bench_run, "_SETTLE_S", 0)
    return ScriptedProcess


def rounds_of(log: list[Asked], size: int) -> list[list[str]]:
    order = [name for _, name, do in log if do in ("round", "sweep")]
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def test_candidates_and_the_probe_take_turns_in_every_round(tiny_bundle: Path, scripted: type[ScriptedProcess]) -> None:
    options = BenchOptions((16,), decode_steps=4, rounds=6, layouts=("static", "growing"), roofline=True)
    bench([tiny_bundle], options)
    rounds = rounds_of(scripted.log, 3)
    everyone = {"doge-tiny static", "doge-tiny growing", "probe"}
    assert len(rounds) == 6 and all(set(order) == everyone for order in rounds)
    assert Counter(order[0] for order in rounds) == dict.fromkeys(everyone, 2), "each goes first equally often"


def test_the_standard_graph_is_a_candidate_of_its_own(tiny_bundle: Path, scripted: type[ScriptedProcess]) -> None:
    report = bench([tiny_bundle], BenchOptions((16,), decode_steps=4, rounds=2, loads=1, portable=True))
    assert [(c.name, c.portable) for c in report.candidates] == [("doge-tiny", False), ("doge-tiny portable", True)]


def test_each_time_to_spin_is_a_candidate_of_its_own(tiny_bundle: Path, scripted: type[ScriptedProcess]) -> None:
    report = bench([tiny_bundle], BenchOptions((16,), decode_steps=4, rounds=2, loads=1, spins=(0, 50)))
    assert [(c.name, c.spin) for c in report.candidates] == [("doge-tiny spin 0", 0), ("doge-tiny spin 50", 50)]


def test_an_engine_is_a_candidate_of_its_own(
    tiny_bundle: Path, scripted: type[ScriptedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_bundle(tiny_bundle)
    engines = {"one": record_of(opened)}
    built = Bundle(opened.path, replace(opened.manifest, engines=engines))
    monkeypatch.setattr(bench_run, "open_bundle", lambda path, **options: built)
    report = bench([tiny_bundle], BenchOptions((16,), decode_steps=4, rounds=2, loads=1, backends=("ort", "trt-rtx")))
    named = [(c.name, c.backend, c.layout) for c in report.candidates]
    assert named == [("doge-tiny", "ort", "static"), ("doge-tiny trt-rtx", "trt-rtx", "static")]


def test_an_engine_must_have_been_built(tiny_bundle: Path, scripted: type[ScriptedProcess]) -> None:
    with pytest.raises(UsageError, match=r"has no trt engine; make one with `doge-deploy build"):
        bench([tiny_bundle], BenchOptions(backends=("trt",)))


def test_an_engine_is_opened_by_its_backend(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(backend, "open_backend", lambda bundle, *names, **options: asked.append((names, options)))
    candidate = Candidate("x", "bundle", str(tiny_bundle), "float32", 512, 1024, layout="static", backend="trt-rtx")
    import_libraries(candidate)
    open_candidate(candidate, threads=3)
    open_candidate(replace(candidate, backend="ort"), threads=3)
    assert asked == [
        (("trt-rtx",), {"layout": "static", "threads": None, "spin": None, "flush_denormals": True, "portable": False}),
        (("ort",), {"layout": "static", "threads": 3, "spin": None, "flush_denormals": True, "portable": False}),
    ]


def test_load_and_memory_are_of_fresh_processes_one_alive_at_a_time(
    tiny_bundle: Path, scripted: type[ScriptedProcess]
) -> None:
    options = BenchOptions((16,), decode_steps=4, rounds=2, loads=3, layouts=("static", "growing"))
    report = bench([tiny_bundle], options)
    measured = [number for number, _, do in scripted.log if do == "memory"]
    assert len(set(measured)) == len(measured) == 2 * 3
    assert all(load.peak_bytes == 3 for found in report.results[0].measurements for load in found.loads)
    assert not {number for number, _, do in scripted.log if do == "round"} & set(measured)


def test_ratios_come_from_the_same_processes_and_rounds(tiny_bundle: Path, scripted: type[ScriptedProcess]) -> None:
    report = bench([tiny_bundle], BenchOptions((16,), decode_steps=4, rounds=4, loads=1, layouts=("static", "growing")))
    (result,) = report.results
    own, other = result.measurements
    timed = {name: number for number, name, do in scripted.log if do == "round"}
    expected = timed[other.candidate] / timed[own.candidate]
    decode = ratios(own, other)["decode"]
    assert (decode.of_medians, decode.lowest, decode.highest) == (expected,) * 3


def test_workloads_are_the_cross_product() -> None:
    options = BenchOptions((8, 16), (0, 32), (1, 2), decode_steps=4)
    assert [workload.name for workload in options.workloads()] == [
        "prompt 8",
        "prompt 16",
        "past 32, prompt 8",
        "past 32, prompt 16",
        "batch 2, prompt 8",
        "batch 2, prompt 16",
        "batch 2, past 32, prompt 8",
        "batch 2, past 32, prompt 16",
    ]


def test_a_workload_that_does_not_fit_is_refused_before_anything_is_measured(
    tiny_bundle: Path, scripted: type[ScriptedProcess]
) -> None:
    with pytest.raises(UsageError, match=r"past 5000, prompt 16 .* need 5022 tokens, but the max_length of"):
        bench([tiny_bundle], BenchOptions((16,), (0, 5000), decode_steps=4))
    assert not scripted.log


def test_the_same_bundle_twice_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="named twice"):
        bench([tiny_bundle, tiny_bundle], BenchOptions((16,), decode_steps=4))


def test_baselines_need_one_checkpoint(tiny_bundle: Path, tiny_moe_bundle: Path) -> None:
    with pytest.raises(UsageError, match="one checkpoint; these come from 2"):
        bench([tiny_bundle, tiny_moe_bundle], BenchOptions((16,), decode_steps=4, against=("transformers",)))


def test_a_plain_export_is_left_out_where_its_trace_would_be_wrong(
    tiny_bundle: Path, scripted: type[ScriptedProcess], tmp_path: Path
) -> None:
    options = BenchOptions((16, 64), decode_steps=4, rounds=2, loads=1, against=("naive",), cache=tmp_path)
    short, long = bench([tiny_bundle], options).results
    assert short.of("naive").rounds and not long.of("naive").rounds
    assert long.of("naive").not_measured == "right for at most 64 tokens, needs 70"
    assert to_json(bench([tiny_bundle], options))["results"][1]["ratios"] == []


def test_what_is_not_installed_is_left_out_and_the_rest_is_timed(
    tiny_bundle: Path, scripted: type[ScriptedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.metadata.version

    def version(name: str) -> str:
        if name == "llama-cpp-python":
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    options = BenchOptions((16,), decode_steps=4, rounds=2, loads=1, against=("llama.cpp", "transformers"))
    report = bench([tiny_bundle], options)
    assert [candidate.name for candidate in report.candidates] == ["doge-tiny", "transformers"]
    line = "bench --against llama.cpp needs llama-cpp-python, which is not installed: pip install 'doge-deploy[llama]'"
    assert report.left_out == {"llama.cpp": line} and to_json(report)["left_out"] == report.left_out
    assert report.results[0].of("transformers").rounds


def test_what_takes_one_row_is_left_out_of_larger_batches(
    tiny_bundle: Path, scripted: type[ScriptedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Candidate("one", "genai", "x", "float32", 512, 1024, rows=1)
    monkeypatch.setitem(catalog.BASELINES, "genai", StandIn([one]))
    report = bench([tiny_bundle], BenchOptions((16,), (0,), (1, 4), 4, 2, 1, against=("genai",)))
    single, batch = report.results
    assert single.of("one").rounds and not batch.of("one").rounds
    assert batch.of("one").not_measured == "takes at most 1 row at once, the workload has 4"


class StandIn(catalog.Baseline):
    """A baseline that needs nothing and is asked for nothing."""

    def __init__(self, made: list[Candidate]) -> None:
        super().__init__("genai", "genai", (), "eager")
        object.__setattr__(self, "made", made)

    def load(self) -> Any:
        return SimpleNamespace(candidates=lambda wanted: self.made)  # type: ignore[attr-defined]


def test_a_legacy_checkpoint_has_no_baselines(tmp_path: Path, scripted: type[ScriptedProcess]) -> None:
    checkpoint = golden_legacy.DIRECTORY / "dense"
    bundle = make_bundle(checkpoint, tmp_path / "bundle", num_layers=1)
    options = BenchOptions((4,), decode_steps=2, against=("transformers",), reference=str(checkpoint))
    with pytest.raises(UsageError, match=r"transformers cannot run .*, a checkpoint of the 2025-08 code"):
        bench([bundle], options)
    assert not scripted.log


def test_baselines_take_the_same_tokens(tmp_path: Path) -> None:
    """What `test_for_real` sees of each in a process of its own, here without processes."""
    opened = open_bundle(shared_bundle("doge-tiny", num_layers=1))
    checkpoint, facts = open_checkpoint("doge-tiny", num_layers=1).path, opened.manifest.facts
    export_naive(checkpoint, tmp_path / "naive", facts=facts, dtype="float32", num_layers=1, last_logits=True)
    limits: dict[str, Any] = {"max_length": 64, "last_logits": True}
    runners: list[Runner] = [
        open_runner(opened),
        EagerRunner(load_model(checkpoint, dtype="float32", num_layers=1), **limits),
        open_naive(Candidate("naive", "naive", str(tmp_path / "naive"), "float32", 64, 1024), threads=1),
    ]
    workload = Workload(1, 0, 16, 3)
    calls = [time_first_calls(runner, workload, workload.input_ids(facts.vocab_size)) for runner in runners]
    assert calls[0].tokens == calls[1].tokens == calls[2].tokens
    for runner in runners[1:]:
        for name, rows in runner.cache().items():
            np.testing.assert_allclose(np.squeeze(rows), np.squeeze(runners[0].cache()[name]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("against", cases({"alone": ((),), "baselines": (("transformers", "naive"),)}, ["alone"]))
def test_for_real(against: tuple[str, ...], tmp_path: Path) -> None:
    bundle = shared_bundle("doge-tiny", num_layers=1)
    options = BenchOptions(
        (16,),
        decode_steps=3,
        rounds=2,
        loads=1,
        threads=1,
        against=against,
        roofline=True,
        cache=tmp_path,
    )
    report = bench([bundle], options)
    (result,) = report.results
    own, *baselines = result.measurements
    assert len(baselines) == len(against)
    for found in (own, *baselines):
        assert found.tokens == own.tokens, f"{found.candidate} computes something else"
        assert [len(times.decode_ns) for times in found.rounds] == [3, 3]
        assert [len(times.prefill_ns) for times in found.rounds] == [PREFILLS] * 2
        assert all(time > 0 for times in found.rounds for time in (*times.prefill_ns, *times.decode_ns))
    assert [len(sweeps) for sweeps in result.sweeps_ns] == [SWEEPS] * 2
    assert figures(result, own)["bandwidth_share"]["lowest"] > 0
    assert len(result.products_ns) == 2
    assert {"float32", "int8"} == set(product_rates(result)) and product_rates(result)["float32"][1][0] > 1e6
    data = to_json(report)
    assert [row["against"] for row in data["results"][0]["ratios"]] == list(against)
    write_json(report, tmp_path / "bench.json")
    assert (tmp_path / "bench.json").stat().st_size > 1000

    from doge_deploy.bench.plot import plot

    plot(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
