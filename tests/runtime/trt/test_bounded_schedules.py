"""Bounded engines: random schedules of what a server does with rows, against the full selection of the reference.

The standard graph keeps the score of every token; the keys that the reference keeps are the best of all of them, of
equal ones the earliest. After every call the stand-in engine must hold just those, and give the same logits.

    pytest -m sweep tests/runtime/trt/test_bounded_schedules.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from bundles import make_bundle, shared_bundle
from random_doge import SMALL, random_doge, shared_doge

from doge_deploy.bundle.opening import Bundle, open_bundle
from doge_deploy.options.build import BuildOptions
from doge_deploy.runtime.base import FloatArray, IntArray
from doge_deploy.runtime.ort import open_runner
from doge_deploy.runtime.trt.bounded import BoundedTrtRunner
from doge_deploy.runtime.trt.lowered import open_lowered

LENGTH, ROWS, OPERATIONS = 64, 3, 24
VOCABULARY = 256

SHAPES: tuple[dict[str, Any], ...] = (
    {"keep_window_size": 8},
    {"keep_window_size": 1},
    {"keep_window_size": 5, "num_key_value_heads": 1},
    {"keep_window_size": 13, "num_key_value_heads": 4},
)

TOKENS = ("distinct", "few", "all-equal")
"""No token twice in a row; three tokens again and again, which tie exactly in the first layer; every key scores 1."""

NEAR = 1e-5
"""Of the largest score of a layer: what may be between keys at the edge of the window that two runs order otherwise. In
the first layer, whose scores depend on a token alone, nothing may.
"""

CLOSE = 1e-5
"""Of the largest logit."""


@pytest.fixture(scope="module")
def equal_scores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Bundle]:
    """Of a shape, by its number, a model that was not trained."""
    folder = tmp_path_factory.mktemp("equal")

    @cache
    def made(number: int) -> Bundle:
        model = random_doge(**config(SHAPES[number]))
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.A.zero_()
        model.save_pretrained(folder / f"checkpoint-{number}")
        return open_bundle(make_bundle(folder / f"checkpoint-{number}", folder / f"bundle-{number}"))

    return made


def config(shape: dict[str, Any]) -> dict[str, Any]:
    return {**SMALL, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, **shape}


def kept(scores: FloatArray, window: int) -> IntArray:
    """The reference's selection: positions of the best keys `[Hkv, w]`, ties to the earliest, in order."""
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :window], axis=1)


class Schedule:
    """One schedule on the stand-in engine and on the standard graph.

    Args:
        bundle: what both run.
        seed: of everything that is drawn.
        tokens: one of `TOKENS`.
    """

    def __init__(self, bundle: Bundle, seed: int, tokens: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.tokens = tokens
        piece = int(self.rng.integers(2, 9))
        build = BuildOptions.model_validate({"batch_size": [1, 1, ROWS], "sequence_length": [1, piece, piece]})
        self.own: BoundedTrtRunner = open_lowered(bundle, bundle.layout("static"), options=build, threads=1)
        self.standard: Any = open_runner(bundle, "static", portable=True, threads=1)
        self.parted: set[int] = set()
        """Rows whose keys once were others, within the noise of scores: what follows in them may differ."""
        self.counts: Counter[str] = Counter()
        self.log: list[str] = [f"pieces of {piece}"]
        self.reset()

    def run(self) -> Counter[str]:
        operations = {
            self.call: 6,
            self.step: 10,
            self.one_row: 5,
            self.copy: 2,
            self.clear: 2,
            self.cut: 2,
            self.swap: 1,
        }
        operations[self.reset] = 1
        weights = np.array(list(operations.values())) / sum(operations.values())
        for _ in range(OPERATIONS):
            list(operations)[int(self.rng.choice(len(weights), p=weights))]()
        return self.counts

    def both(self, name: str, *arguments: Any) -> None:
        self.log.append(f"{name}{arguments}")
        for runner in (self.own, self.standard):
            getattr(runner, name)(*arguments)

    def reset(self) -> None:
        self.rows = int(self.rng.integers(1, ROWS + 1))
        self.both("reset", self.rows)
        self.parted = set()
        self.fresh = [self.rng.permutation(VOCABULARY).tolist() for _ in range(self.rows)]

    def draw(self, row: int, count: int) -> IntArray:
        if self.tokens == "few":
            return self.rng.integers(5, 8, count)
        if len(self.fresh[row]) < count:
            self.fresh[row] = self.rng.permutation(VOCABULARY).tolist()
        return np.array([self.fresh[row].pop() for _ in range(count)])

    def room(self, row: int) -> int:
        return LENGTH - int(self.own.row_lengths[row])

    def feed(self, first: int, lengths: list[int]) -> None:
        """A call of some rows, padded to the longest."""
        width = max(lengths)
        ids = np.stack([np.resize(self.draw(first + b, n), width) for b, n in enumerate(lengths)])
        self.log.append(f"run {first} {lengths}")
        found, expected = (
            runner.run_rows(first, ids, np.array(lengths)).numpy() for runner in (self.own, self.standard)
        )
        self.counts["calls"] += 1
        self.check()
        for b, n in enumerate(lengths):
            if first + b in self.parted:
                self.counts["rows left out"] += 1
                continue
            one, two = (out[b, -1 if out.shape[1] == 1 else n - 1] for out in (found, expected))
            assert np.abs(one - two).max() <= CLOSE * np.abs(two).max(), self.log
            self.counts["rows of logits"] += 1

    def call(self) -> None:
        most = min(map(self.room, range(self.rows)))
        if most > 1:
            self.feed(0, self.rng.integers(1, min(most, 20) + 1, self.rows).tolist())

    def step(self) -> None:
        if min(map(self.room, range(self.rows))) > 0:
            self.feed(0, [1] * self.rows)

    def one_row(self) -> None:
        row = int(self.rng.integers(self.rows))
        if self.room(row) > 0:
            self.feed(row, [int(self.rng.integers(1, min(self.room(row), 20) + 1))])

    def copy(self) -> None:
        source, target = (int(row) for row in self.rng.integers(0, self.rows, 2))
        held = int(self.own.row_lengths[source])
        if source != target and held:
            tokens = held if self.own.has_dropped(source) else int(self.rng.integers(1, held + 1))
            self.both("copy_row", source, target, tokens)
            self.parted = self.parted - {target} | ({target} if source in self.parted else set())
            self.fresh[target] = list(self.fresh[source])
            self.check()

    def clear(self) -> None:
        row = int(self.rng.integers(self.rows))
        self.both("clear_row", row)
        self.parted -= {row}
        self.fresh[row] = self.rng.permutation(VOCABULARY).tolist()
        self.check()

    def cut(self) -> None:
        row = int(self.rng.integers(self.rows))
        held = int(self.own.row_lengths[row])
        if held and not self.own.has_dropped(row):
            self.both("truncate_row", row, int(self.rng.integers(0, held + 1)))
            self.check()

    def swap(self) -> None:
        if self.rows < 2:
            return
        a, b = (int(row) for row in self.rng.choice(self.rows, 2, replace=False))
        self.both("swap_rows", a, b)
        exchanged = {a: b, b: a}
        self.parted = {exchanged.get(row, row) for row in self.parted}
        self.fresh[a], self.fresh[b] = self.fresh[b], self.fresh[a]
        self.check()

    def check(self) -> None:
        """What each row holds, of each layer and head."""
        window, whole = self.own.window, self.standard.cache()
        for layer, rows in self.own.held_positions().items():
            for row, held in enumerate(rows):
                scores = whole[f"present.{layer}.score"][row][..., 0]
                assert held.shape == (len(scores), min(scores.shape[1], window)), self.log
                best = kept(scores, window)
                self.counts["selections"] += 1
                if np.array_equal(held, best) or row in self.parted:
                    continue
                exact = layer == 0 or self.tokens == "all-equal"
                assert not exact, (self.log, layer, row, held, best)
                for own, right, score in zip(held, best, scores, strict=True):
                    assert len(set(own.tolist())) == len(own), self.log
                    gap = score[right].min() - score[own].min()
                    assert gap <= NEAR * np.abs(score).max(), (self.log, layer, row, own, right, gap)
                self.counts["other sets at near ties"] += 1
                self.parted.add(row)


def schedule(seed: int, equal_scores: Callable[[int], Bundle]) -> Counter[str]:
    number, tokens = seed % len(SHAPES), TOKENS[seed // len(SHAPES) % len(TOKENS)]
    if tokens == "all-equal":
        bundle = equal_scores(number)
    else:
        bundle = open_bundle(shared_bundle(shared_doge(**config(SHAPES[number]))))
    return Schedule(bundle, seed, tokens).run()


def test_a_few_schedules(equal_scores: Callable[[int], Bundle]) -> None:
    found = sum((schedule(seed, equal_scores) for seed in (0, 5, 8)), Counter[str]())
    assert found["rows of logits"] > 50 and found["selections"] > 100


@pytest.mark.sweep
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_many_schedules(first: int, equal_scores: Callable[[int], Bundle]) -> None:
    found = sum((schedule(seed, equal_scores) for seed in range(first, first + 20)), Counter[str]())
    print(dict(found))
    assert found["rows of logits"] > 50 * found["rows left out"]


@pytest.mark.parametrize("fault", ["the latest of equal keys stay", "a row is cleared elsewhere"])
def test_a_fault_is_found(fault: str, equal_scores: Callable[[int], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "a row is cleared elsewhere":
        clear = BoundedTrtRunner._clear_row
        monkeypatch.setattr(BoundedTrtRunner, "_clear_row", lambda self, row, kept: clear(self, max(row - 1, 0), kept))
    else:
        monkeypatch.setattr(
            f"{__name__}.kept",
            lambda scores, window: np.sort(
                scores.shape[1] - 1 - np.argsort(-scores[:, ::-1], axis=1, kind="stable")[:, :window], axis=1
            ),
        )
    with pytest.raises(AssertionError):
        for seed in range(8, 20):
            schedule(seed, equal_scores)
