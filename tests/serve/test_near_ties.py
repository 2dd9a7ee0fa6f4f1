"""The certificate of `serve-same`: what it calls possible holds every token that is picked, and little else."""

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
CONTEXT = Context([0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("noise", "most"), [(0.0, 1.0), (0.01, 1.5), (0.1, 5.0)])
def test_what_is_possible(kind: str, noise: float, most: float) -> None:
    """All that a way picks, nearly all that one more way picks, and few other tokens of 40."""
    sampler, chosen = Sampler(SamplingOptions(**KINDS[kind], seed=1)), np.random.default_rng(5)
    sizes, missed, moved = [], 0, 0
    for trial in range(100):
        scores = (chosen.normal(size=40) * 2).astype(np.float32)
        if trial % 3 == 0:
            scores[chosen.integers(0, 40, 8)] = -np.inf
        ways = [(scores + chosen.normal(size=40) * noise).astype(np.float32) for _ in range(26)]
        state = sampler._random.bit_generator.state
        u = sampler._random.random()
        picks = []
        for row in ways:
            sampler._random.bit_generator.state = state
            picks.append(sampler.pick(row, CONTEXT))
        sampler._random.random()
        found = possible_tokens(sampler, ways[:-1], CONTEXT, u)
        assert set(picks[:-1]) <= set(found)
        missed += picks[-1] not in found
        moved += len(set(picks)) > 1
        sizes.append(len(found))
    assert missed == 0 and np.mean(sizes) <= most, (missed, np.mean(sizes))
    assert noise < 0.1 or moved, "nothing was tried"


def boundaries(*shares: float) -> Any:
    return np.log(np.array(shares, np.float32))


def test_only_what_is_near_the_number_is_possible() -> None:
    sampler = Sampler(SamplingOptions(do_sample=True, top_k=0, seed=3))
    ways = [boundaries(0.50, 0.2, 0.3), boundaries(0.51, 0.2, 0.29)]
    for u, expected in ((0.3, [0]), (0.49, [0]), (0.496, [0, 1]), (0.514, [0, 1]), (0.52, [1]), (0.71, [1, 2])):
        assert possible_tokens(sampler, ways, CONTEXT, u) == expected, u


def test_a_greedy_token_is_possible_within_the_range_of_its_distance() -> None:
    sampler = Sampler(SamplingOptions())
    first = np.array([1.0, 0.9, 0.5], np.float32)
    assert possible_tokens(sampler, [first, first], CONTEXT, 0.0) == [0]
    assert possible_tokens(sampler, [first, first + np.array([0, 0.05, 0], np.float32)], CONTEXT, 0.0) == [0]
    assert possible_tokens(sampler, [first, first + np.array([0, 0.08, 0], np.float32)], CONTEXT, 0.0) == [0, 1]


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

    def more(case: same_text.Case, rows: Any, found: same_text.Run, at: int) -> list[int]:
        possible = original(case, rows, found, at)
        return [*possible, other] if at == place else possible

    monkeypatch.setattr(certificates, "_possible", more)
    turns = certificates.explain(case, run.answer)
    assert turns is not None and [(turn["place"], turn["to"]) for turn in turns] == [(place, other)]
    text, reason, count = run.answer
    assert certificates.explain(case, (text + "x", reason, count)) is None, "what follows is not looked at"
    assert certificates.explain(case, (text, reason, count + 1)) is None
