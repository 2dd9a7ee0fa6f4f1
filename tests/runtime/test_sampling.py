"""Sampling against its slow twin, transformers' logits processors."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from doge_deploy.errors import DogeDeployError, UnsupportedModelError, UsageError
from doge_deploy.options.generation import SamplingOptions
from doge_deploy.runtime.sampling import (
    Context,
    Sampler,
    add_biases,
    min_p_ids,
    penalize_output,
    penalize_repetition,
    softmax,
    top_k_ids,
    top_p_ids,
)

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 63)
BIASES = st.dictionaries(st.integers(0, 62), st.floats(-100, 100, width=32).filter(bool), max_size=4)


def draw_logits(seed: int, size: int, *, ties: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """`[size]`; rounded to halves, so that many are equal, where `ties`."""
    logits = np.random.default_rng(seed).normal(scale=3, size=size)
    return (np.round(logits * 2) / 2 if ties else logits).astype(np.float32)


def run_twin(
    processor: LogitsProcessor, scores: np.ndarray[Any, Any], context: list[int] | None = None
) -> np.ndarray[Any, Any]:
    """What transformers makes of one row of scores."""
    ids = torch.tensor([context or [0]])
    processed: np.ndarray[Any, Any] = processor(ids, torch.from_numpy(scores)[None]).numpy()[0]
    return processed


def finite_ids(scores: np.ndarray[Any, Any]) -> set[int]:
    return set(np.flatnonzero(np.isfinite(scores)).tolist())


class TestAgainstTransformers:
    @settings(deadline=None)
    @given(SEEDS, SIZES, st.floats(0.001, 1))
    def test_min_p_keeps_the_same_ids(self, seed: int, size: int, min_p: float) -> None:
        scores = draw_logits(seed, size, ties=False).astype(np.float64)
        assume(np.abs(softmax(scores) / softmax(scores).max() - min_p).min() > 1e-12 or min_p == 1)
        assert set(min_p_ids(scores, min_p).tolist()) == finite_ids(run_twin(MinPLogitsWarper(min_p), scores))

    @settings(deadline=None)
    @given(SEEDS, SIZES, st.floats(0.1, 3), st.data())
    def test_repetition_penalty_is_equal_to_the_last_bit(
        self, seed: int, size: int, penalty: float, data: st.DataObject
    ) -> None:
        logits = draw_logits(seed, size, ties=False)
        context = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
        twin = run_twin(RepetitionPenaltyLogitsProcessor(penalty), logits, context)
        np.testing.assert_array_equal(penalize_repetition(logits, context, penalty), twin)

    @settings(deadline=None)
    @given(SEEDS, SIZES, st.integers(1, 70), st.booleans())
    def test_top_k_keeps_the_same_ids(self, seed: int, size: int, top_k: int, ties: bool) -> None:
        logits = draw_logits(seed, size, ties=ties)
        assert set(top_k_ids(logits, top_k).tolist()) == finite_ids(run_twin(TopKLogitsWarper(top_k), logits))

    @settings(deadline=None)
    @given(SEEDS, SIZES, st.floats(0, 0.999))
    def test_top_p_keeps_the_same_ids(self, seed: int, size: int, top_p: float) -> None:
        scores = draw_logits(seed, size, ties=False).astype(np.float64)
        # Both accumulate, from opposite ends: at a sum within rounding of top_p either answer is right.
        assume(np.abs(np.cumsum(np.sort(softmax(scores))[::-1]) - top_p).min() > 1e-12)
        assert set(top_p_ids(scores, top_p).tolist()) == finite_ids(run_twin(TopPLogitsWarper(top_p), scores))

    @settings(deadline=None)
    @given(SEEDS, SIZES, st.floats(0, 0.999))
    def test_top_p_among_equals_keeps_as_much_probability(self, seed: int, size: int, top_p: float) -> None:
        scores = draw_logits(seed, size, ties=True).astype(np.float64)
        assume(np.abs(np.cumsum(np.sort(softmax(scores))[::-1]) - top_p).min() > 1e-12)
        kept = sorted(scores[top_p_ids(scores, top_p)])
        twin = finite_ids(run_twin(TopPLogitsWarper(top_p), scores))
        assert kept == sorted(scores[sorted(twin)])

    def test_top_p_keeps_the_lowest_of_equals(self) -> None:
        scores = np.log([0.1, 0.2, 0.2, 0.3, 0.2])
        assert top_p_ids(scores, 0.65).tolist() == [3, 1, 2]

    @settings(deadline=None)
    @given(
        SEEDS, st.integers(2, 63), st.floats(0.05, 5), st.integers(0, 63), st.floats(0.05, 1), st.floats(0, 0.9), BIASES
    )
    def test_the_whole_chain_has_the_same_distribution(
        self, seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float, biases: dict[int, float]
    ) -> None:
        logits = draw_logits(seed, size, ties=False)
        context = [0, size - 1]
        biases = {token: bias for token, bias in biases.items() if token < size}
        twin = logits
        if biases:
            twin = run_twin(SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases.items()}), twin)
        twin = run_twin(RepetitionPenaltyLogitsProcessor(1.3), twin, context).astype(np.float64)
        for processor in (
            TemperatureLogitsWarper(temperature),
            *([TopKLogitsWarper(top_k)] if top_k else []),
            *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
            *([MinPLogitsWarper(min_p)] if min_p else []),
        ):
            before = softmax(twin)
            twin = run_twin(processor, twin)
            if isinstance(processor, TopPLogitsWarper):
                assume(np.abs(np.cumsum(np.sort(before)[::-1]) - top_p).min() > 1e-9)
            if isinstance(processor, MinPLogitsWarper):
                assume(np.abs(before / before.max() - min_p).min() > 1e-9)
        sampler = Sampler(SamplingOptions(True, temperature, top_k, top_p, 1.3, min_p=min_p, logit_bias=biases))
        ids, probabilities = sampler.distribution(logits, context)
        distribution = np.zeros(size)
        distribution[ids] = probabilities
        np.testing.assert_allclose(distribution, softmax(twin), rtol=1e-9, atol=1e-300)


class TestGreedy:
    def test_takes_the_lowest_of_equals(self) -> None:
        assert Sampler(SamplingOptions()).pick(np.array([1, 5, 5, 2], np.float32), []) == 1

    def test_looks_at_the_repetition_penalty_but_not_at_the_temperature(self) -> None:
        sampler = Sampler(SamplingOptions(temperature=9.0, repetition_penalty=2.0))
        assert sampler.pick(np.array([3, 5, 4], np.float32), [1]) == 2

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_dtype(self, dtype: type[np.floating[Any]]) -> None:
        assert Sampler(SamplingOptions()).pick(np.array([0, -1, 0.5], dtype), []) == 2

    def test_ids_beyond_the_vocabulary_are_not_penalized(self) -> None:
        logits = np.array([1, 2], np.float32)
        np.testing.assert_array_equal(penalize_repetition(logits, [0, 2, 99], 2.0), [0.5, 2])

    def test_leaves_the_logits_as_they_are(self) -> None:
        logits = np.array([1, 2, -3], np.float32)
        Sampler(SamplingOptions(True, 0.5, 2, 0.5, 1.5)).pick(logits, [0, 1, 2])
        np.testing.assert_array_equal(logits, [1, 2, -3])


class TestContext:
    @settings(deadline=None)
    @given(SEEDS, SIZES, st.floats(0.1, 3), st.lists(st.integers(-1, 70), max_size=200))
    def test_penalty_is_that_of_a_plain_list(self, seed: int, size: int, penalty: float, tokens: list[int]) -> None:
        logits = draw_logits(seed, size, ties=False)
        context = Context(tokens[:3])
        for token in tokens[3:]:
            context.append(token)
        assert list(context) == tokens and len(context) == len(tokens) and context[1:] == tokens[1:]
        assert sorted(context.distinct) == sorted(set(tokens))
        np.testing.assert_array_equal(
            penalize_repetition(logits, context, penalty), penalize_repetition(logits, tokens, penalty)
        )

    def test_no_step_reads_the_tokens_again(self) -> None:
        """The list behind it is not read when a token is chosen."""

        class Unread(list[int]):
            def __iter__(self) -> Any:
                raise AssertionError("the whole context was read")

            __getitem__ = __array__ = __iter__  # type: ignore[assignment]

        context = Context([1, 2] * 1000)
        context._tokens = Unread(context._tokens)
        sampler = Sampler(SamplingOptions(repetition_penalty=2.0))
        for _ in range(3):
            context.append(sampler.pick(np.array([1, 2, 3, 2.5], np.float32), context))
        assert len(context) == 2003

    @given(SEEDS, SIZES, st.lists(st.integers(-1, 70), max_size=200))
    @settings(deadline=None)
    def test_penalties_of_the_output_are_those_of_its_counts(self, seed: int, size: int, tokens: list[int]) -> None:
        logits = draw_logits(seed, size, ties=False)
        tokens += range(60, 60 + len(tokens))
        context = Context(tokens[:3])
        for token in tokens[3:]:
            context.append(token)
        expected = logits.copy()
        for token, count in Counter(tokens[3:]).items():
            if 0 <= token < size:
                expected[token] -= np.float32(0.5) + np.float32(0.25) * np.float32(count)
        found = Sampler(SamplingOptions(presence_penalty=0.5, frequency_penalty=0.25)).scores(logits, context)
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"frequency_penalty": 0.5},
            {"presence_penalty": 0.5},
            {"logit_bias": dict.fromkeys(range(5000), 0.5)},
            {"repetition_penalty": 1.1},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_no_token_of_them_is_looked_at_by_itself(self, options: dict[str, Any]) -> None:
        """In Python, where a step that is made for 8 texts would take several times as long."""
        context, sampler = Context([1]), Sampler(SamplingOptions(**options))
        for token in range(5000):
            context.append(token)
        logits = draw_logits(0, 6000, ties=False)
        sampler.pick(logits, context)
        assert lines_of(lambda: sampler.pick(logits, context)) < 200


def lines_of(work: Callable[[], object]) -> int:
    """Lines of Python that are run."""
    count = 0

    def trace(frame: Any, event: str, value: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


class TestDraw:
    def test_follows_the_distribution(self) -> None:
        sampler = Sampler(SamplingOptions(do_sample=True, top_k=0, seed=0))
        logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
        draws = np.bincount([sampler.pick(logits, []) for _ in range(4000)], minlength=3)
        np.testing.assert_allclose(draws / 4000, [0.5, 0.3, 0.2], atol=0.03)

    def test_seed_decides(self) -> None:
        logits = np.zeros(50, np.float32)
        first, again, other = (
            [sampler.pick(logits, []) for _ in range(20)]
            for sampler in (Sampler(SamplingOptions(do_sample=True, seed=seed)) for seed in (7, 7, 8))
        )
        assert first == again != other

    @settings(deadline=None)
    @given(SEEDS, st.floats(1e-320, 1e300), st.floats(0, 1))
    def test_never_what_is_ruled_out(self, seed: int, temperature: float, top_p: float) -> None:
        logits = draw_logits(seed, 20, ties=True)
        logits[::2] = -np.inf
        sampler = Sampler(SamplingOptions(True, temperature, 5, top_p, seed=seed))
        assert sampler.pick(logits, []) % 2 == 1

    @pytest.mark.parametrize(
        "limits",
        [{"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-320}],
        ids=lambda limits: next(iter(limits)),
    )
    def test_limits_that_leave_the_likeliest(self, limits: dict[str, Any]) -> None:
        sampler = Sampler(SamplingOptions(do_sample=True, **limits))
        logits = np.array([1e4, 3e4, 2e4], np.float32)
        assert {sampler.pick(logits, []) for _ in range(20)} == {1}


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("logits", "name"),
    [
        ([0, np.nan, np.nan, 1], "NaN at 2 of 4"),
        ([0, np.inf, np.nan, 1], "NaN at 1 of 4"),
        ([0, np.inf, 1], r"\+inf at 1 of 3"),
        ([-np.inf, -np.inf], "-inf at 2 of 2"),
    ],
    ids=["nan", "nan and inf", "inf", "all -inf"],
)
def test_logits_without_a_distribution(logits: list[float], name: str, do_sample: bool) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        Sampler(SamplingOptions(do_sample=do_sample)).pick(np.array(logits, np.float32), [1, 2, 3])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", "yes"),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "warm"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
    ],
)
def test_illegal_option(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as raised:
        SamplingOptions(**{name: value})
    message = str(raised.value)
    assert message.startswith(f"{name}={value!r}: must be") and "\n" not in message
    assert isinstance(raised.value, DogeDeployError) and raised.value.exit_code == 2


class TestOpenAIsRules:
    def test_biases_are_added_and_unknown_tokens_passed_over(self) -> None:
        logits = draw_logits(0, 8, ties=False)
        biased = add_biases(logits, np.array([2, 7, 8]), np.array([5, -100, 3], np.float32))
        expected = logits.copy()
        expected[2] += 5
        expected[7] -= 100
        np.testing.assert_array_equal(biased, expected)

    def test_presence_counts_once_and_frequency_each_time(self) -> None:
        logits = np.zeros(6, np.float32)
        ids, counts = np.array([1, 4, 9, 2]), np.array([1, 3, 2, 0], np.float32)
        np.testing.assert_allclose(penalize_output(logits, ids, counts, 0.5, 0.25), [0, -0.75, 0, 0, -1.25, 0])

    def test_the_prompt_is_not_penalized(self) -> None:
        sampler = Sampler(SamplingOptions(presence_penalty=2.0))
        context = Context([3])
        logits = np.array([0, 0, 1, 2], np.float32)
        assert sampler.pick(logits, context) == 3
        context.append(3)
        assert sampler.pick(logits, context) == 2

    def test_a_bias_decides(self) -> None:
        logits = np.array([0, 0, 1, 2], np.float32)
        assert Sampler(SamplingOptions(logit_bias={0: 50})).pick(logits, Context([1])) == 0

    def test_what_is_unlikely_beside_the_best_is_never_drawn(self) -> None:
        sampler = Sampler(SamplingOptions(do_sample=True, top_k=0, min_p=0.5, seed=0))
        logits = np.array([0.0, 0.1, -0.6, -0.8], np.float32)  # beside the best: 0.90, 1, 0.497, 0.41
        assert {sampler.pick(logits, Context([1])) for _ in range(200)} == {0, 1}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"min_p": 1.5}, "min_p=1.5: must be a number from 0 (no limit) to 1"),
            ({"presence_penalty": 3}, "presence_penalty=3: must be a number from -2 to 2"),
            ({"frequency_penalty": float("nan")}, "frequency_penalty=nan: must be a number from -2 to 2"),
            ({"logit_bias": {-1: 0}}, "logit_bias: -1 is not a token id"),
            ({"logit_bias": [1, 2]}, "logit_bias=[1, 2]: must be a mapping"),
            ({"logit_bias": {1: 101}}, "logit_bias: 101 for token 1: must be a number from -100 to 100"),
        ],
    )
    def test_illegal_values_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError) as caught:
            SamplingOptions(**options)
        assert str(caught.value).startswith(message)
