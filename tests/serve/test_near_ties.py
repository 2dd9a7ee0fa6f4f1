"""The certificate of `serve-same`: what it calls possible holds every token that is, and little else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doge_deploy.options.generation import SamplingOptions
from doge_deploy.runtime.sampling import Context, Sampler

sys.path.insert(0, str(Path(__file__).parent / "load"))

import same_text
from near_ties import possible_tokens

KINDS = {
    "greedy": {},
    "all": {"do_sample": True, "top_k": 0},
    "hot": {"do_sample": True, "top_k": 0, "temperature": 1.7},
    "top_k": {"do_sample": True, "top_k": 5, "temperature": 0.5},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.8},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.2},
    "together": {"do_sample": True, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "temperature": 0.9},
}


def picked(options: SamplingOptions, scores: np.ndarray, state: object) -> int:
    sampler = Sampler(options)
    sampler._random.bit_generator.state = state
    return sampler.pick(scores, Context([0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_what_is_picked_within_the_noise_is_possible(kind: str, noise: float) -> None:
    options, chosen = SamplingOptions(**KINDS[kind], seed=1), np.random.default_rng(5)
    sampler = Sampler(options)
    sizes, moved = [], 0
    for trial in range(60):
        scores = (chosen.normal(size=40) * 2).astype(np.float32)
        if trial % 3 == 0:
            scores[chosen.integers(0, 40, 8)] = -np.inf
        state = sampler._random.bit_generator.state
        u = sampler._random.random()
        found = possible_tokens(options, scores, noise + 1e-6 * (noise > 0), u)
        sizes.append(len(found))
        first = picked(options, scores, state)
        assert first in found
        for _ in range(30):
            # at its ends the noise moves most
            shift = chosen.choice([-noise, noise], 40) if trial % 2 else chosen.uniform(-noise, noise, 40)
            other = picked(options, (scores + shift).astype(np.float32), state)
            assert other in found, (trial, u)
            moved += other != first
    assert noise == 0 or moved > 0, "nothing was tried"
    assert np.mean(sizes) < {0.0: 1.01, 0.01: 1.6, 0.3: 14.0}[noise], "it calls everything possible"


def test_only_the_pick_is_possible_without_noise() -> None:
    options = SamplingOptions(do_sample=True, top_k=0, seed=3)
    scores = np.log(np.array([0.5, 0.2, 0.3]))
    assert possible_tokens(options, scores, 0.0, 0.1) == [0]
    assert possible_tokens(options, scores, 0.0, 0.6) == [1]
    assert possible_tokens(options, scores, 0.0, 0.9) == [2]


def test_a_drawn_token_is_possible_only_where_the_number_is_near_its_boundary() -> None:
    options = SamplingOptions(do_sample=True, top_k=0, seed=3)
    scores = np.log(np.array([0.5, 0.2, 0.3]))
    assert possible_tokens(options, scores, 0.01, 0.499) == [0, 1]
    assert possible_tokens(options, scores, 0.01, 0.48) == [0]
    assert possible_tokens(options, scores, 0.01, 0.704) == [1, 2]
    assert 2 not in possible_tokens(options, scores, 0.01, 0.499), "a token that is no neighbour of the number"


@pytest.fixture(scope="module")
def certificates(tiny_bundle_last: Path) -> same_text.Certificates:
    return same_text.Certificates(same_text.Alone(tiny_bundle_last), same_text.Layouts(tiny_bundle_last))


def drawn(certificates: same_text.Certificates, kind: str) -> same_text.Case:
    """The first case of a kind that has tokens enough."""
    for number in range(200):
        case = same_text.draw(number, certificates.alone.tokenizer, "m")
        greedy = case.choices.get("do_sample") is False
        if kind != ("guided" if case.pattern else "greedy" if greedy else "sampled"):
            continue
        certificates.alone.expect(case)
        if len(case.tokens) >= 4 and len(certificates.alone.ids(case)) < 300:
            return case
    raise AssertionError("no such case")


@pytest.mark.parametrize("kind", ["greedy", "sampled", "guided"])
def test_a_text_with_another_token_is_explained_only_where_that_was_possible(
    certificates: same_text.Certificates, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, alone = drawn(certificates, kind), certificates.alone
    found = alone.follow(case, ())
    assert found.answer == (case.text, case.reason, len(case.tokens)), "the loop is not generate's"
    assert certificates.explain(case, found.answer) == []
    others: list[tuple[int, int, same_text.Run]] = []
    for other in range(70, 1000):
        try:
            run = alone.follow(case, [*found.tokens[:1], other])
        except Exception:  # the grammar does not allow it
            continue
        if run.text != found.text and "\ufffd" not in run.text and other != found.tokens[1]:
            others.append((1, other, run))
            break
    assert others
    place, other, run = others[0]
    assert certificates.explain(case, run.answer) is None, "a token that could not be picked was believed"

    original = certificates._possible

    def more(case: same_text.Case, rows: Any, found: same_text.Run, at: int) -> tuple[float, list[int]]:
        noise, possible = original(case, rows, found, at)
        return noise, [*possible, other] if at == place else possible

    monkeypatch.setattr(certificates, "_possible", more)
    turns = certificates.explain(case, run.answer)
    assert turns is not None and [(turn["place"], turn["to"]) for turn in turns] == [(place, other)]
    text, reason, count = run.answer
    assert certificates.explain(case, (text + "x", reason, count)) is None, "what follows is not looked at"
    assert certificates.explain(case, (text, reason, count + 1)) is None
