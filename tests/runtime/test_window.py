"""A cache of the window computes what a cache of the whole text computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle
from random_doge import SMALL, SMALL_MOE, save_random_doge
from sweeps import fixture_cases

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.ort import OrtRunner, open_runner, window
from doge_deploy.runtime.ort.window import WindowOrtRunner
from doge_deploy.verify.run import verify

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped-heads": ({}, {}),
    "one-kv-head": ({"num_key_value_heads": 1}, {"logits": "all"}),
    "kv-head-per-head": ({"num_key_value_heads": 4}, {}),
    "window-1": ({"keep_window_size": 1}, {}),
    "moe-reference": (SMALL_MOE, {}),
    "moe-per-token": (SMALL_MOE, {"routing": "per-token"}),
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts are cut and dropped from often."""
    monkeypatch.setattr(window, "CHUNK", 5)
    monkeypatch.setattr(window, "SPARE", 3)


@pytest.fixture(scope="module", params=fixture_cases(CONFIGS, always=["grouped-heads", "window-1", "moe-per-token"]))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config, options = request.param
    path = tmp_path_factory.mktemp("window")
    checkpoint = save_random_doge(path / "checkpoint", **{**SMALL, "head_dim": 16, **config, "vocab_size": 256})
    return open_bundle(make_bundle(checkpoint, path / "bundle", **options))


def replay(runner: OrtRunner, calls: Sequence[Sequence[int]]) -> list[FloatArray]:
    """Calls of two rows, each with the real tokens of a row; the logits of the last real ones."""
    ids = np.random.default_rng(0).permutation(256)[:128].reshape(2, 64)
    runner.reset(2)
    done, logits = np.zeros(2, int), []
    for lengths in calls:
        width = max(lengths)
        part = np.stack([np.resize(ids[b, done[b] : done[b] + n], width) for b, n in enumerate(lengths)])
        out = runner.run(part, list(lengths))
        logits.append(np.stack([out[b, n - 1 if out.shape[1] > 1 else 0] for b, n in enumerate(lengths)]))
        done += lengths
    return logits


@pytest.mark.parametrize(
    "calls",
    [[(4, 2)] + [(1, 1)] * 30, [(31, 17), (1, 1), (9, 2), (1, 1)], [(3, 12), (12, 3), (1, 1), (13, 13)]],
    ids=["decode", "prefill-then-chunks", "uneven-rows"],
)
def test_the_standard_graph_agrees(bundle: Bundle, calls: list[tuple[int, int]]) -> None:
    runner = open_runner(bundle)
    assert isinstance(runner, WindowOrtRunner)
    standard = replay(open_runner(bundle, portable=True), calls)
    for found, expected in zip(replay(runner, calls), standard, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


def test_slots_do_not_grow_with_the_text(bundle: Bundle) -> None:
    runner = open_runner(bundle)
    assert isinstance(runner, WindowOrtRunner)
    runner.reset(1)
    w = bundle.manifest.facts.keep_window_size
    most = 0
    for token in range(60):
        runner.run(np.array([[token + 3]]))
        most = max(most, int(runner.held()[0]))
    assert most <= w + window.SPARE
    (kept,) = runner.positions(0)
    assert kept[:, -1].tolist() == [59] * len(kept), "the newest token is there"
    assert (np.diff(kept, axis=1) > 0).all(), "slots are in the order of the text"
    assert runner.cache()["present.0.key"][0].shape[1] == runner.held()[0]


def test_verification_passes_with_dropped_keys(bundle: Bundle) -> None:
    report = verify(bundle.path, reference=str(bundle.path.parent / "checkpoint"), greedy_steps=16)
    assert report.graphs == {"static": "model.ort.onnx"}
    assert report.passed, [(result.case, result.failures) for result in report.results]


def test_verification_finds_a_key_dropped_too_early(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    if bundle.manifest.facts.keep_window_size == 1:
        pytest.skip("a window of one key has none to spare")

    def drop(self: WindowOrtRunner, rows: slice) -> None:
        self.window -= 1
        original(self, rows)
        self.window += 1

    original = WindowOrtRunner._drop
    monkeypatch.setattr(WindowOrtRunner, "_drop", drop)
    report = verify(bundle.path, reference=str(bundle.path.parent / "checkpoint"), greedy_steps=16)
    assert not report.passed
    failed = {result.case for result in report.results if not result.passed}
    assert failed & {"window decode", "window chunk", "greedy", "natural text"}


def test_a_fresh_text_starts_empty(bundle: Bundle) -> None:
    runner = open_runner(bundle)
    first = replay(runner, [(20, 11), (1, 1)])
    again = replay(runner, [(20, 11), (1, 1)])
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
