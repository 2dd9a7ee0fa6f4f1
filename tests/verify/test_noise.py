"""More draws of the reference's noise: what they are, when they are made, and that they excuse no error."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bundles import make_bundle, shared_bundle
from random_doge import random_doge, save_random_doge
from torch import nn

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.verify.cases import Case, chunk
from doge_deploy.verify.compare import Array, difference
from doge_deploy.verify.live import LiveExpected, LiveOracle
from doge_deploy.verify.noise import DRAWS, MOST_BY_CHANCE, independent_errors, noise_of, pool
from doge_deploy.verify.parity import CaseResult, Judge
from doge_deploy.verify.reference_run import ReplayTrace
from doge_deploy.verify.replay import CandidateTrace, Replay
from doge_deploy.verify.rounding import rounded_once_more
from doge_deploy.verify.runners import open_runners
from doge_deploy.verify.source import open_reference


def test_a_pool_is_the_sample_that_its_draws_make_together() -> None:
    exact = [np.zeros(4)]
    one, other = np.array([1.0, 2.0, 0.0, 0.0]), np.array([0.0, 0.0, 0.0, 6.0])
    found = pool([difference([one], exact), difference([other], exact)])
    together = difference([np.concatenate((one, other))], [np.zeros(8)])
    assert (found.max_abs, found.rms, found.effective) == pytest.approx(
        (together.max_abs, together.rms, together.effective)
    )


def test_draws_without_any_error_are_a_sample_of_their_size() -> None:
    assert pool([difference([np.ones(3)], [np.ones(3)])] * 2).effective == 6


SPECTRA: dict[str, Array] = {
    "one-direction": np.ones(1),
    "one-direction-of-many": np.array([0.6] + [0.4 / 40] * 40),
    "twenty": np.ones(20),
    "hundreds": np.ones(400),
}
"""Variances of independent errors, of which each is then many numbers."""


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=list(SPECTRA))
def test_numbers_that_follow_few_errors_are_counted_as_few(spectrum: Array) -> None:
    """A thousand numbers, all of them sums of a few errors: what one draw shows is a thousand."""
    generator = np.random.default_rng(0)
    mixing = np.linalg.qr(generator.normal(size=(1000, len(spectrum))))[0]
    exact = [np.zeros((2, 500))]
    draws = [
        [(mixing @ (generator.normal(size=len(spectrum)) * np.sqrt(spectrum))).reshape(2, 500)]
        for _ in range(1 + DRAWS)
    ]
    true = spectrum.sum() ** 2 / (spectrum**2).sum()
    assert noise_of(draws[:1], exact).effective > 100
    assert true / 4 < independent_errors(draws, exact) < 4 * true
    found = noise_of(draws, exact)
    assert found.effective <= 4 * true and found.draws == 1 + DRAWS
    assert found.rms == pytest.approx(pool([difference(draw, exact) for draw in draws]).rms)


def test_what_all_draws_share_is_no_chance() -> None:
    generator = np.random.default_rng(0)
    errors = generator.normal(size=(9, 500))
    exact = [np.zeros(500)]
    alone = independent_errors([[row] for row in errors], exact)
    assert independent_errors([[row + 5] for row in errors], exact) == pytest.approx(alone)


def test_long_tensors_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = np.random.default_rng(0).normal(size=(5, 700)) * np.linspace(0, 1, 700)
    draws, exact = [[row[:300], row[300:]] for row in errors], [np.zeros(300), np.zeros(400)]
    whole = independent_errors(draws, exact)
    monkeypatch.setattr("doge_deploy.verify.noise._BLOCK", 64)
    assert independent_errors(draws, exact) == pytest.approx(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_inputs_of_a_linear_layer_get_the_variance_of_one_rounding(dtype: torch.dtype) -> None:
    linear = nn.Linear(4096, 4096, bias=False, dtype=dtype)
    linear.weight.data = torch.eye(4096, dtype=dtype)
    x = torch.ones(16, 4096, dtype=dtype) * 1.5
    with torch.no_grad(), rounded_once_more(linear, 0):
        moved = ((linear(x) - x) / torch.finfo(dtype).eps).double()
    assert set(moved.unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0, 2.0}
    share = (moved != 0).double().mean().item()
    assert share == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 12 / moved.numel()))
    assert abs(moved.mean().item()) < 4 * math.sqrt(4 / 12 / moved.numel())
    assert torch.equal(linear(x), x), "and none when it is over"


def test_a_seed_is_a_draw() -> None:
    model, ids = random_doge(), torch.arange(12)[None]

    def logits(seed: int) -> torch.Tensor:
        with torch.no_grad(), rounded_once_more(model, seed):
            result: torch.Tensor = model(ids).logits
            return result

    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("noise")
    path = save_random_doge(folder / "checkpoint")
    bundle = open_bundle(make_bundle(path, folder / "bundle", logits="all"))
    checkpoint = open_checkpoint(str(path))
    return Judge(bundle, "static", open_runners(bundle, "static"), LiveOracle(bundle, checkpoint))


CASE = Case("prefill", chunk([np.arange(3, 15)], [[12]]), exact=True)


def first_draw(judge: Judge) -> tuple[list[Array], float]:
    """Logits of the reference, and their largest noise."""
    expected = judge.oracle.expected("static", judge.replay, CASE, None)
    assert isinstance(expected, LiveExpected)
    return expected.same.logits, difference(expected.same.logits, expected.wider.logits).max_abs


def judged(judge: Judge, monkeypatch: pytest.MonkeyPatch, times: float) -> tuple[CaseResult, int]:
    """The case with one logit off by `times` the largest noise; and how many more draws were made."""
    logits, noise = first_draw(judge)
    feed, draw, draws = Replay.feed, LiveExpected._draw, []

    def off(self: Replay, *arguments: Any) -> CandidateTrace:
        trace = feed(self, *arguments)
        trace.logits[0] = logits[0].copy()
        trace.logits[0][5, 7] += times * noise
        return trace

    def counted(self: LiveExpected, *arguments: Any) -> Any:
        draws.append(arguments)
        return draw(self, *arguments)

    monkeypatch.setattr(Replay, "feed", off)
    monkeypatch.setattr(LiveExpected, "_draw", counted)
    return judge.judge(CASE), len(draws)


def test_what_passes_is_not_judged_twice(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    result, draws = judged(judge, monkeypatch, 1.0)
    assert result.passed and not draws


def test_more_draws_excuse_no_error(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    result, draws = judged(judge, monkeypatch, 12.0)
    assert not result.passed and draws


def test_what_no_chance_explains_is_not_drawn_for(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    result, draws = judged(judge, monkeypatch, 1000.0)
    assert not result.passed and not draws


@pytest.mark.parametrize("most", [MOST_BY_CHANCE, 0.0], ids=["drawn", "not-drawn"])
def test_without_more_draws_a_sound_bundle_is_refused(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, most: float
) -> None:
    """The slow twin of the shortcut: a first draw that happens to be 12 times smaller than others and the bundle's."""
    logits, noise = first_draw(judge)
    feed, draw = Replay.feed, LiveExpected._draw

    def drawn(seed: int) -> list[Array]:
        random = np.random.default_rng(seed)
        return [rows + (12 * noise * random.uniform(-1, 1, rows.shape)).astype(rows.dtype) for rows in logits]

    def of_the_bundle(self: Replay, *arguments: Any) -> CandidateTrace:
        trace = feed(self, *arguments)
        trace.logits[:] = drawn(100)
        return trace

    def of_the_reference(self: LiveExpected, seed: int) -> ReplayTrace:
        return replace(draw(self, seed), logits=drawn(seed))

    monkeypatch.setattr(Replay, "feed", of_the_bundle)
    monkeypatch.setattr(LiveExpected, "_draw", of_the_reference)
    monkeypatch.setattr("doge_deploy.verify.parity.MOST_BY_CHANCE", most)
    assert judge.judge(CASE).passed == bool(most)


@pytest.mark.sweep
def test_a_row_of_logits_is_few_errors() -> None:
    """A sound bundle that was refused: one row of 1024 logits, whose errors follow two or three directions."""
    bundle = open_bundle(shared_bundle("doge-tiny-moe", routing="per-token"))
    with LiveOracle(bundle, open_reference(bundle, None)) as oracle:
        judge = Judge(bundle, "static", open_runners(bundle, "static"), oracle)
        case = oracle.case("window K=w", judge)
        assert isinstance(case, Case)
        result = judge.judge(case)
        assert result.passed, result.failures
        expected = oracle.expected("static", judge.replay, case, None)
        assert expected.noise("logits", more=False).effective > 100
        assert expected.noise("logits", more=True).effective < 40
