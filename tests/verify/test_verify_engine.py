"""Verification of an engine, which shows no selections: on a stand-in that computes what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_stand_ins import DECODE, SHARED, axes, held_runner

from doge_deploy.bundle.engine_record import EngineProfile
from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.runtime.base import FloatArray, IntArray
from doge_deploy.runtime.trt.backend import TrtBackend
from doge_deploy.runtime.trt.runner import TrtRunner
from doge_deploy.verify import run
from doge_deploy.verify.report import Report

ALL_CASES = 12


@pytest.fixture
def verify_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    def verify(path: Path, *, damage: Callable[[TrtRunner], None] = lambda runner: None, **changes: Any) -> Report:
        def open_stand_in(self: TrtBackend, bundle: Bundle, *arguments: Any, **options: Any) -> TrtRunner:
            runner = held_runner(bundle, **{"profiles": (SHARED,), **changes})
            damage(runner)
            return runner

        monkeypatch.setattr(TrtBackend, "open", open_stand_in)
        monkeypatch.setattr(TrtBackend, "require", lambda self, bundle: None)
        return run.verify(path, backend="trt-rtx", greedy_steps=24)

    return verify


def test_an_engine_is_held_against_the_reference(verify_engine: Callable[..., Report], tiny_bundle: Path) -> None:
    report = verify_engine(tiny_bundle)
    assert report.passed and {result.layout for result in report.results} == {"static"}
    assert report.graphs == {"static": "an engine, --backend trt-rtx"}
    judged = {result.case for result in report.results}
    assert {"prefill", "decode", "batch of 2", "window K=w+1", "window decode", "greedy"} <= judged
    assert set(report.skipped) == {"natural text"} and "does not show what it selects" in report.skipped["natural text"]
    assert len(judged) + len(report.skipped) == ALL_CASES


def test_the_greedy_text_of_an_engine_stays_within_the_window(
    verify_engine: Callable[..., Report], tiny_bundle: Path
) -> None:
    window = open_bundle(tiny_bundle).manifest.facts.keep_window_size
    report = verify_engine(tiny_bundle)
    (greedy,) = (result for result in report.results if result.case == "greedy")
    assert greedy.top1.total <= window


def test_cases_that_the_profiles_cannot_take_are_named(verify_engine: Callable[..., Report], tiny_bundle: Path) -> None:
    one = EngineProfile(name="shared", axes=axes((1, 1, 1), (1, 1, 24)))
    report = verify_engine(tiny_bundle, profiles=(one,))
    assert "no profile takes 2 rows of 24 tokens" in report.skipped["batch of 2"]
    assert "no profile takes 1 rows of 48 tokens" in report.skipped["prefill"]
    assert {"decode", "chunked prefill"} <= {result.case for result in report.results}
    assert "greedy" in report.skipped or report.passed


def test_an_engine_that_only_decodes_has_nothing_to_show(
    verify_engine: Callable[..., Report], tiny_bundle: Path
) -> None:
    report = verify_engine(tiny_bundle, profiles=(DECODE,))
    assert not report.passed and "greedy" in report.skipped, "nothing judged is not a pass"


def test_a_wrong_engine_is_found_out(verify_engine: Callable[..., Report], tiny_bundle: Path) -> None:
    def forget_the_past(runner: TrtRunner) -> None:
        """Decode as if the first slot had never been written."""
        original = runner._run

        def run_wrong(input_ids: IntArray, lengths: IntArray) -> FloatArray:
            for memory in runner._caches.values():
                memory.array[: memory.nbytes // 100] = 0  # type: ignore[attr-defined]
            return original(input_ids, lengths)

        runner._run = run_wrong  # type: ignore[method-assign]

    report = verify_engine(tiny_bundle, damage=forget_the_past)
    assert "static/decode" in report.failed_cases and "static/prefill" not in report.failed_cases


def test_experts_are_judged_where_the_reference_is_clear(
    verify_engine: Callable[..., Report], tiny_moe_bundle: Path
) -> None:
    report = verify_engine(tiny_moe_bundle)
    assert report.passed, report.failed_cases
    assert {"natural text", "greedy"} <= set(report.skipped)
    assert np.all([result.selected == "" for result in report.results])
