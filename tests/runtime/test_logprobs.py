"""Logprobs, biases and penalties of a whole text against transformers, which generates the same text its own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted_runner import ScriptedRunner
from transformers import DogeForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

import doge_deploy
from doge_deploy.options.generation import GenerationOptions, SamplingOptions
from doge_deploy.runtime.generate import TextGenerator
from doge_deploy.runtime.logprobs import RecordingSampler, log_probabilities
from doge_deploy.runtime.sampling import Context, Sampler
from doge_deploy.runtime.tokenizer import Tokenizer

DOGE_TINY = Path(doge_deploy.__file__).parent / "demo" / "doge-tiny"
PROMPT = "A list is"
COUNT = 30


class OutputPenalties(LogitsProcessor):  # type: ignore[misc]
    """The formula of OpenAI's documentation, token by token: mu - count * frequency - (count > 0) * presence."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        output = input_ids[0, self.prompt :].tolist()
        for token in range(scores.shape[1]):
            count = output.count(token)
            scores[0, token] -= count * self.frequency + (self.presence if count > 0 else 0)
        return scores


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"frequency_penalty": -0.3},
        {"logit_bias": {312: -100.0, 92: -3.5, 548: 2.25}},
        {"repetition_penalty": 1.3, "logit_bias": {634: -4.0}, "presence_penalty": 0.7},
    ],
    ids=["nothing", "penalties", "reward", "biases", "all"],
)
def test_text_and_logprobs_are_those_of_transformers(tiny_bundle: Path, choices: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DOGE_TINY)
    reference = DogeForCausalLM.from_pretrained(DOGE_TINY, attn_implementation="eager")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    penalties = OutputPenalties(length, choices.get("presence_penalty", 0), choices.get("frequency_penalty", 0))
    biases = {(token,): bias for token, bias in choices.get("logit_bias", {}).items()}
    output = reference.generate(
        **prompt,
        max_new_tokens=COUNT,
        do_sample=False,
        sequence_bias=biases or None,
        repetition_penalty=choices.get("repetition_penalty"),
        logits_processor=LogitsProcessorList([penalties]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = output.sequences[0, length:].tolist()
    with doge_deploy.load(tiny_bundle) as model:
        made = model.generate(PROMPT, do_sample=False, max_new_tokens=COUNT, logprobs=4, **choices)
    assert [entry.token for entry in made.logprobs] == expected
    assert made.statistics.new_tokens == len(expected)
    for entry, logits in zip(made.logprobs, output.logits, strict=True):
        twin = torch.log_softmax(logits[0].double(), 0)
        assert entry.logprob == pytest.approx(float(twin[entry.token]), abs=1e-3)
        best = torch.topk(twin, 4)
        np.testing.assert_allclose([logprob for _, logprob in entry.top], best.values, atol=1e-3)
        apart = float((best.values[:-1] - best.values[1:]).min())
        if apart > 1e-3:
            assert [token for token, _ in entry.top] == best.indices.tolist()


def test_biases_and_penalties_change_the_text(tiny_bundle: Path) -> None:
    """So that the test above compares something."""
    with doge_deploy.load(tiny_bundle, defaults={"do_sample": False, "max_new_tokens": COUNT}) as model:
        plain = model.generate(PROMPT).text
        for choices in ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"logit_bias": {312: -100.0}}):
            assert model.generate(PROMPT, **choices).text != plain  # type: ignore[arg-type]


def test_nothing_is_noted_unless_it_is_asked_for(tiny_bundle: Path) -> None:
    with doge_deploy.load(tiny_bundle, defaults={"max_new_tokens": 3}) as model:
        assert model.generate(PROMPT).logprobs == ()
        stream = model.stream(PROMPT, logprobs=0)
        assert stream.logprobs == ()
        next(stream)
        assert stream.logprobs and all(entry.top == () for entry in stream.logprobs)


def test_a_recorded_draw_is_the_same_draw() -> None:
    options = SamplingOptions(do_sample=True, top_k=0, temperature=1.4, seed=3)
    plain, recorded = Sampler(options), RecordingSampler(Sampler(options), 2)
    logits = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    context = Context([1])
    picks = [plain.pick(row, context) for row in logits]
    assert [recorded.pick(row, context) for row in logits] == picks
    assert [entry.token for entry in recorded.entries] == picks
    assert recorded.entries == [log_probabilities(row, token, 2) for row, token in zip(logits, picks, strict=True)]


def test_entries_end_with_the_text() -> None:
    """A stop string ends a text in the middle of what was computed."""
    tokenizer = Tokenizer.from_directory(DOGE_TINY)
    letters = tokenizer.ids("abcdef", add_special_tokens=False)
    runner = ScriptedRunner(lambda history: letters[min(len(history) - 1, len(letters) - 1)], vocab_size=1024)
    options = GenerationOptions(max_new_tokens=9, stop=("c",), logprobs=1)
    stream = TextGenerator(runner, tokenizer, options).stream([7])
    assert "".join(stream) == "ab"
    assert len(stream.logprobs) == stream.statistics.new_tokens <= len(letters)
    assert [entry.token for entry in stream.logprobs] == letters[: stream.statistics.new_tokens]


def test_the_likeliest_of_many_equals_are_the_lowest() -> None:
    entry = log_probabilities(np.zeros(9, np.float32), 8, 3)
    assert [token for token, _ in entry.top] == [0, 1, 2]
    assert entry.logprob == pytest.approx(-np.log(9))


def test_more_than_there_are() -> None:
    assert [token for token, _ in log_probabilities(np.array([0, 2, 1], np.float32), 0, 7).top] == [1, 2, 0]
