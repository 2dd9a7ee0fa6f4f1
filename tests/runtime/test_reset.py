"""Texts that follow each other in the same caches."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import make_bundle
from random_doge import SMALL, save_random_doge

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.runtime.base import FloatArray
from doge_deploy.runtime.ort import OrtRunner, open_runner
from doge_deploy.runtime.ort.runners import StaticOrtRunner

WINDOWS = {"whole-text": 64, "window": 8}
"""keep_window_size of a bundle of 64 tokens."""


@pytest.fixture(scope="module", params=WINDOWS.values(), ids=WINDOWS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("reset")
    config = {**SMALL, "head_dim": 16, "keep_window_size": request.param, "max_position_embeddings": 64}
    return open_bundle(make_bundle(save_random_doge(path / "checkpoint", **config), path / "bundle"))


def text(runner: OrtRunner, seed: int, *, batch: int = 1, width: int = 20) -> list[FloatArray]:
    """Logits of a prefill of `width` tokens, of which the second half is padding, and of decode steps."""
    ids = np.random.default_rng(seed).integers(3, SMALL["vocab_size"], (batch, width + 4))
    runner.reset(batch)
    calls = [runner.run(ids[:, :width], [width // 2] * batch)]
    return [*calls, *(runner.run(ids[:, [step]]) for step in range(width, width + 4))]


@pytest.mark.parametrize("portable", [False, True], ids=["lowered", "standard"])
@pytest.mark.parametrize("batches", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_a_text_does_not_depend_on_the_one_before(bundle: Bundle, portable: bool, batches: tuple[int, int]) -> None:
    used, fresh = (open_runner(bundle, portable=portable) for _ in range(2))
    before, now = batches
    text(used, 0, batch=before, width=40)
    for mine, theirs in zip(text(used, 1, batch=now), text(fresh, 1, batch=now), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert all(
        np.array_equal(mine[name][b], rows[b])
        for mine, theirs in [(used.cache(), fresh.cache())]
        for name, rows in theirs.items()
        for b in range(now)
    )


@pytest.mark.parametrize("portable", [False, True], ids=["lowered", "standard"])
def test_what_overflowed_does_not_outlive_its_text(bundle: Bundle, portable: bool) -> None:
    """The standard graph multiplies hidden values by 0: an infinite one would make every later text NaN."""
    runner = open_runner(bundle, portable=portable)
    assert isinstance(runner, StaticOrtRunner)
    expected = text(runner, 1)
    text(runner, 0, width=40)
    for buffer in runner._buffers.values():
        buffer[:, :, : runner._written.max()] = np.inf  # what a model that overflows leaves behind
    assert runner._written.max() >= WINDOWS["window"]
    for mine, theirs in zip(text(runner, 1), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_second_text_takes_no_new_caches(bundle: Bundle) -> None:
    runner = open_runner(bundle)
    assert isinstance(runner, StaticOrtRunner)
    text(runner, 0)
    before = dict(runner._buffers)
    text(runner, 1)
    assert all(runner._buffers[name] is buffer for name, buffer in before.items())
