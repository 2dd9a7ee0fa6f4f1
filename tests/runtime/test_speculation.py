"""Guesses change the time that a text takes and never the text; logits of several tokens are those of one at a time."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle
from random_doge import SMALL, save_random_doge

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.errors import UsageError
from doge_deploy.options.generation import SamplingOptions
from doge_deploy.runtime.backend import open_backend
from doge_deploy.runtime.base import FloatArray, IntArray
from doge_deploy.runtime.generate import generate
from doge_deploy.runtime.logits import HostLogits, Logits
from doge_deploy.runtime.rows import RowsRunner
from doge_deploy.runtime.sampling import Sampler
from doge_deploy.runtime.slots import open_slots
from doge_deploy.runtime.speculation import DraftLength, Guesser, NgramIndex, guesser_for
from doge_deploy.runtime.text_model import TextModel

VOCAB = 50


def unforeseen(held: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(held, np.int64).tobytes()) % VOCAB


def periodic(held: Sequence[int]) -> int:
    return held[-7] if len(held) >= 7 else unforeseen(held)


def nearly_periodic(held: Sequence[int]) -> int:
    return unforeseen(held) if len(held) % 11 == 0 else periodic(held)


RULES = [unforeseen, periodic, nearly_periodic]


class ScriptedRow(RowsRunner):
    """One row whose next token is a function of everything that it holds, guesses too."""

    def __init__(self, rule: Callable[[Sequence[int]], int], max_length: int = 200, *, many: bool = True) -> None:
        super().__init__(max_length=max_length, last_logits=many)
        self.rule, self.many_logits, self.vocab_size = rule, many, VOCAB
        self.held: list[int] = []
        self.calls: list[int] = []
        """Tokens of each call, and..."""
        self.ends: list[int] = []
        """...what the row held behind it."""

    def _reset(self, batch_size: int) -> None:
        self.held.clear()

    def _logits(self, input_ids: IntArray, last: int) -> HostLogits:
        del self.held[int(self.row_lengths[0]) :]
        rows = []
        for token in input_ids[0].tolist():
            self.held.append(token)
            row = np.random.default_rng(zlib.crc32(np.array(self.held).tobytes())).standard_normal(VOCAB)
            row[self.rule(self.held)] += 4
            rows.append(row.astype(np.float32))
        self.calls.append(len(rows))
        self.ends.append(len(self.held))
        return HostLogits(np.stack(rows[-last:])[None])

    def _run_rows(self, first: int, input_ids: IntArray, lengths: IntArray) -> Logits:
        return self._logits(input_ids, 1 if self.many_logits else input_ids.shape[1])

    def _run_last(self, first: int, input_ids: IntArray, last: int) -> Logits:
        return self._logits(input_ids, last)

    def _clear_row(self, row: int, kept: int) -> None:
        del self.held[kept:]

    def _copy_row(self, source: int, target: int, tokens: int) -> None:
        raise AssertionError

    def _swap_rows(self, a: int, b: int) -> None:
        raise AssertionError

    def cache(self) -> dict[str, list[FloatArray]]:
        return {}


def text(row: ScriptedRow, guesser: Guesser | None, seed: int, **changes: Any) -> list[int]:
    options = SamplingOptions(do_sample=seed % 2 == 1, seed=seed, temperature=0.7)
    prompt = random.Random(seed).choices(range(VOCAB), k=1 + seed % 9)
    return list(generate(row, prompt, Sampler(options), max_new_tokens=120, guesser=guesser, **changes))


@pytest.mark.parametrize("many", [True, False], ids=["rows-asked-for", "all-rows"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(6))
def test_a_text_is_the_same_with_guesses(seed: int, rule: Callable[[Sequence[int]], int], many: bool) -> None:
    plain, guessing = ScriptedRow(rule, many=many), ScriptedRow(rule, many=many)
    guesser = Guesser(guessing, guessing.max_length)
    for eos_ids in ((), (3, 4)):
        expected = text(plain, None, seed, eos_ids=eos_ids)
        assert text(guessing, guesser, seed, eos_ids=eos_ids) == expected
        assert guessing.held == plain.held and guessing.row_lengths.tolist() == [len(plain.held)]
    if rule is periodic and seed % 2 == 0:
        assert guesser.accepted > 20 and len(guessing.calls) < len(plain.calls)


def test_a_runner_that_keeps_wrong_guesses_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, guessing = ScriptedRow(nearly_periodic), ScriptedRow(nearly_periodic)
    monkeypatch.setattr(Guesser, "cut", lambda self, tokens: None)
    assert text(guessing, Guesser(guessing, 200), 0) != text(plain, None, 0)


def test_who_stops_reading_leaves_runner_and_random_numbers_as_without_guesses() -> None:
    left = []
    for guessing in (False, True):
        row = ScriptedRow(periodic)
        sampler = Sampler(SamplingOptions(do_sample=True, seed=5, temperature=0.3))
        tokens = generate(
            row, [1, 2, 3, 4, 5, 6, 7], sampler, max_new_tokens=90, guesser=Guesser(row, 200) if guessing else None
        )
        read = [next(tokens) for _ in range(50)]
        tokens.close()  # type: ignore[attr-defined]
        left.append((read, sampler._random.random()))
        assert row.row_lengths.tolist() == [7 + 49]
    assert left[0] == left[1]


def test_nothing_is_guessed_beyond_what_can_be_taken_back() -> None:
    row = ScriptedRow(periodic)
    text(row, Guesser(row, 60), 0)
    assert max(row.calls[1:]) > 1
    calls = list(zip(row.calls, row.ends, strict=True))[1:]
    assert all(end <= 60 for width, end in calls if width > 1) and any(end > 60 for _, end in calls)


def test_the_latest_text_behind_the_longest_ngram_is_guessed() -> None:
    index = NgramIndex([1, 2, 3, 9, 1, 2, 3, 8, 5, 2, 3])
    assert index.draft(2) == [8, 5]
    assert NgramIndex([7, 1, 2, 3, 4, 0, 2, 3, 6, 1, 2, 3]).draft(1) == [4], "four and three tokens go before two"
    assert NgramIndex([1, 2, 3]).draft(3) == []
    assert NgramIndex([4, 4, 4]).draft(5) == [4] * 5


@pytest.mark.parametrize("seed", range(20))
def test_a_text_is_known_whatever_pieces_it_comes_in(seed: int) -> None:
    chances, text, index = random.Random(seed), [], NgramIndex()
    for _ in range(12):
        piece = [chances.randrange(4) for _ in range(chances.choice([0, 1, 1, 2, 5, 9]))]
        text += piece
        index.extend(piece)
        assert len(index) == len(text) and index.draft(9) == searched(text, 9)


def searched(text: Sequence[int], length: int) -> list[int]:
    """The same guess, by looking through the text."""
    for size in (4, 3, 2):
        for place in range(len(text) - 1, size - 1, -1):
            if text[place - size : place] == text[-size:]:
                return [text[place + step % (len(text) - place)] for step in range(length)]
    return []


@pytest.mark.parametrize("right", [0.0, 0.3, 0.9])
def test_guesses_end_where_they_do_not_pay(right: float) -> None:
    chances, lengths = random.Random(0), DraftLength({1: 1.0, 2: 1.3, 4: 1.9, 8: 2.9})
    made = []
    for _ in range(600):
        length = lengths.choose()
        made.append(length)
        accepted = 0
        while accepted < length and chances.random() < right:
            accepted += 1
        if length:
            lengths.learn(length, accepted)
    late = made[300:]
    if right < 0.5:
        assert sum(length > 0 for length in late) <= 8, "one probe in 64 tokens"
    else:
        assert sum(length >= 3 for length in late) > 250


@pytest.fixture(scope="module")
def last_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle("doge-tiny", tmp_path_factory.mktemp("last") / "bundle", logits="last")


@pytest.fixture(scope="module")
def moe_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle("doge-tiny-moe", tmp_path_factory.mktemp("moe") / "bundle", logits="last", routing="per-token")


@pytest.mark.parametrize("which", ["last_bundle", "moe_bundle"])
def test_logits_of_several_tokens_are_those_of_one_at_a_time(which: str, request: pytest.FixtureRequest) -> None:
    slots = open_slots(open_bundle(request.getfixturevalue(which)), 3, threads=1)
    assert slots.all_logits
    ids = np.random.default_rng(1).integers(5, 900, 24)
    one, other, third = (slots.acquire() for _ in range(3))
    alone = [slots.extend([one], [[token]]).numpy()[0, 0] for token in ids]
    slots.prefill(other, ids[:10])
    slots.prefill(third, ids[:10])
    for begin, last in ((10, 8), (18, 2), (20, 1), (21, 3)):
        parts = [ids[begin : begin + (last if last > 1 else 1)]] * 2
        found = slots.extend([third, other], parts, last).numpy()
        assert found.shape == (2, last, slots.vocab_size)
        expected = np.stack(alone[begin : begin + last])
        for row in found:
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_prompt_pays_for_one_row_of_the_head(last_bundle: Path) -> None:
    slots = open_slots(open_bundle(last_bundle), 1, threads=1)
    assert slots.prefill(slots.acquire(), [5] * 20).numpy().shape == (1, 1, slots.vocab_size)
    with pytest.raises(UsageError, match=r"last=3: the slots get \[2\] tokens"):
        slots.extend([0], [[1, 2]], 3)


def test_a_standard_graph_gives_one_row(last_bundle: Path) -> None:
    bundle = open_bundle(last_bundle)
    runner = open_backend(bundle, portable=True, threads=1)
    assert guesser_for(runner, bundle.manifest) is None
    slots = open_slots(bundle, 1, portable=True, threads=1)
    assert not slots.all_logits
    with pytest.raises(UsageError, match="gives the logits of one token"):
        slots.extend([slots.acquire()], [[1, 2]], 2)


@pytest.fixture(scope="module")
def looping_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: greedy texts soon repeat themselves, and many guesses are right."""
    folder = tmp_path_factory.mktemp("looping")
    checkpoint = save_random_doge(folder / "checkpoint", **{**SMALL, "vocab_size": 256, "keep_window_size": 512})
    return make_bundle(checkpoint, folder / "bundle", logits="last", max_length=320)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tokens", [600, pytest.param(10_000, marks=pytest.mark.sweep)])
def test_generated_tokens_are_the_same_with_guesses(tokens: int, sampled: bool, looping_bundle: Path) -> None:
    """No exception is made for near ties: none has been met."""
    bundle = open_bundle(looping_bundle)
    plain, guessing = (open_backend(bundle, threads=1) for _ in range(2))
    guesser = guesser_for(guessing, bundle.manifest)
    assert guesser is not None
    for number in range(tokens // 200):
        prompt = random.Random(number).choices(range(3, 256), k=40)
        options = SamplingOptions(do_sample=sampled, seed=number, temperature=0.02, top_k=0)
        texts = [
            list(generate(runner, prompt, Sampler(options), max_new_tokens=200, guesser=helper))
            for runner, helper in ((plain, None), (guessing, guesser))
        ]
        assert texts[1] == texts[0]
    assert guesser.accepted > tokens // 20, "guesses were made, and were right"


def test_a_model_guesses_unless_it_is_told_not_to(last_bundle: Path) -> None:
    prompt = "a list of a list of a list of"
    texts = []
    for speculate in (True, False):
        with TextModel(last_bundle, threads=1, speculate=speculate) as model:
            texts.append([model.generate(prompt, max_new_tokens=40, do_sample=False).text for _ in range(2)])
            guesser = model._generator._guesser  # type: ignore[union-attr]
            assert (guesser is not None) == speculate
    assert texts[0] == texts[1]
