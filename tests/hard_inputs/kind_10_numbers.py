"""Numbers at the ends of their ranges: no warning of NumPy, and a choice, or a line."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np

from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.options.generation import SamplingOptions
from doge_deploy.runtime.sampling import Context, Sampler
from hard_inputs.frame import Case, Outcome, refused, right, wrong

KIND = "10 numbers at their ends"

OPTIONS: dict[str, dict[str, float | int]] = {
    "penalty 1e39": {"repetition_penalty": 1e39},
    "penalty 1e-46": {"repetition_penalty": 1e-46},
    "penalty 3.4e38": {"repetition_penalty": 3.4e38},
    "penalty 1e-40": {"repetition_penalty": 1e-40},
    "penalty 1.4e-45": {"repetition_penalty": 1.5e-45},
    "penalty infinite": {"repetition_penalty": float("inf")},
    "penalty NaN": {"repetition_penalty": float("nan")},
    "temperature 5e-324": {"temperature": 5e-324},
    "temperature 1e308": {"temperature": 1e308},
    "temperature NaN": {"temperature": float("nan")},
    "top_p 0": {"top_p": 0.0},
    "top_p 1e-320": {"top_p": 1e-320},
    "top_p NaN": {"top_p": float("nan")},
    "top_k of 400 digits": {"top_k": 10**400},
    "min_p 1": {"min_p": 1.0},
    "min_p 5e-324": {"min_p": 5e-324},
    "all at once": {"repetition_penalty": 1e-40, "temperature": 1e-300, "top_p": 1e-300, "min_p": 1e-300, "top_k": 1},
}
LOGITS: dict[str, list[float]] = {
    "common": [1.5, -2.0, 0.0, 3.0],
    "ruled out": [-np.inf, 2.0, -np.inf, 1.0],
    "largest": [3.4e38, -3.4e38, 3.4e38, 0.0],
    "smallest": [1e-45, -1e-45, 0.0, -0.0],
    "equal": [0.0, 0.0, 0.0, 0.0],
}


def picks(options: dict[str, float | int], folder: Path) -> Outcome:
    """Greedy and drawn, over every kind of logits and context: a token of the vocabulary, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for do_sample in (False, True):
            try:
                sampler = Sampler(SamplingOptions(do_sample=do_sample, seed=0, **options))  # type: ignore[arg-type]
            except UsageError as error:
                return refused(str(error)) if next(iter(options)) in str(error) else wrong(str(error))
            for name, logits in LOGITS.items():
                for context in ([], [0], [0, 1, 2, 3], [9, -1, 3]):
                    scores = np.array(logits, np.float32)
                    token = sampler.pick(scores, Context(context))
                    if not 0 <= token < 4 or scores[token] == -np.inf:
                        return wrong(f"{name}, {context}: {token}")
    return right()


def likeliest(folder: Path) -> Outcome:
    """With a penalty that leaves float32, the token is still the one that exact arithmetic gives."""
    from fractions import Fraction

    draw = np.random.default_rng(0)
    for _ in range(500):
        logits = draw.normal(size=8).astype(np.float32)
        penalty = float(draw.choice([1e-38, 1e-30, 1e30, 3e38]))
        context = draw.choice(8, 3, replace=False).tolist()
        exact = [Fraction(float(value)) for value in logits]
        for token in context:
            exact[token] = exact[token] * Fraction(penalty) if exact[token] < 0 else exact[token] / Fraction(penalty)
        best = max(exact)
        token = Sampler(SamplingOptions(repetition_penalty=penalty)).pick(logits, Context(context))
        if exact[token] != best and not _both_beyond(exact[token], best):
            return wrong(f"{logits}, {context}, {penalty}: {token}")
    return right()


def _both_beyond(one: object, other: object) -> bool:
    """What is beyond float32 is the same there, as what is too small for it is."""
    return all(abs(value) > 2**127 or abs(value) < 2**-140 for value in (one, other))  # type: ignore[arg-type, operator]


def not_finite(values: list[float], name: str, folder: Path) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            Sampler(SamplingOptions(do_sample=True, repetition_penalty=1.5)).pick(np.array(values, np.float32), [0])
        except UnsupportedModelError as error:
            return refused(str(error)) if name in str(error) else wrong(str(error))
    return wrong("taken")


def cases() -> list[Case]:
    return [
        *(Case(name, functools.partial(picks, options)) for name, options in OPTIONS.items()),
        Case("the likeliest token", likeliest),
        Case("logits NaN", functools.partial(not_finite, [1.0, float("nan")], "NaN")),
        Case("logits infinite", functools.partial(not_finite, [1.0, float("inf")], "+inf")),
        Case("logits all ruled out", functools.partial(not_finite, [-float("inf")] * 2, "-inf")),
    ]
