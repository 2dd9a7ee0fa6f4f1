"""Judging quantized weights: how much a bundle's predictions differ from those of the checkpoint.

Two questions are kept apart. Whether the graph computes what its stored weights say is parity, judged on the standard
graph against a reference with the same dequantized weights. What the rounding of the weights costs is judged here, on
the graph that is served, against the reference with the checkpoint's own weights.

Axes: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from doge_deploy.graph.weight_formats import Quality
from doge_deploy.runtime.base import BundleRunner, IntArray
from doge_deploy.verify.cases import Case, chunk
from doge_deploy.verify.compare import Array, Distribution, divergences
from doge_deploy.verify.oracle import HeldOut
from doge_deploy.verify.replay import Replay

SURE = 0.5
"""Probability from which on the reference is sure of a token."""

FEWEST_SURE = 10
"""Positions that must be sure before the share of equal tokens among them says anything."""

ROW_TOKENS = 128
"""Tokens of the text in one row."""


@dataclass(frozen=True)
class QualityResult:
    """What rounding the weights does to the predictions on held-out text."""

    layout: str
    tokens: int
    """Predictions that were compared."""
    mean_kl: float
    """KL(reference || bundle), nats, mean over positions."""
    max_kl: float
    top1: float
    """Share of positions with the same likeliest token."""
    sure: int
    """Positions where the reference gives its likeliest token a probability of at least `SURE`."""
    sure_top1: float | None
    """Share of those with the same likeliest token; None where there are too few."""
    perplexity: float
    reference_perplexity: float
    failures: list[str] = field(default_factory=list)
    emulated: bool = False
    """Judged on the graph that engines are built from, with the inputs of products rounded as in an engine."""

    @property
    def passed(self) -> bool:
        return not self.failures


def held_out_cases(text_ids: IntArray, max_length: int) -> list[tuple[Case, IntArray]]:
    """The text `[T]` in rows, each as calls: half of it as a prefill, then token by token; and the row."""
    width = min(ROW_TOKENS, max_length)
    cases = []
    for start in range(0, max(1, len(text_ids) - width + 1), width):
        row = text_ids[start : start + width]
        half = max(1, len(row) // 2)
        cases.append((Case("held-out text", chunk([row], [[half]] + [[1]] * (len(row) - half)), exact=False), row))
    return cases


def predicted(row: IntArray, logits: Sequence[Array]) -> tuple[Array, IntArray]:
    """Logits `[T, V]` of a row's positions that predict one of its own tokens, and these tokens `[T]`."""
    found = np.concatenate(logits)
    targets = row[len(row) - len(found) + 1 :]
    return found[: len(targets)], targets


def judge_quality(
    layout: str, limits: Quality, runner: BundleRunner, rows: Sequence[HeldOut], replay: Replay
) -> QualityResult:
    """Feed the text to a bundle and compare its predictions with the reference's.

    Args:
        layout: of the runner.
        limits: what rounding may cost in the format of the weights.
        runner: the graph that is served.
        rows: the text, and what the reference makes of it with the checkpoint's own weights, in float32.
        replay: how the layout's calls are made.
    """
    kl, same, sure, q, p = [], [], [], [], []
    finite = True
    for row in rows:
        logits = np.concatenate(replay.feed(runner, row.case).logits)[: len(row.targets)]
        finite = finite and bool(np.isfinite(logits).all())
        expected, found = row.expected, Distribution.whole(logits)
        kl.append(divergences(logits, expected))
        best = expected.best
        same.append(logits.argmax(axis=-1) == best)
        sure.append(expected.logit(best) - expected.normalizer >= np.log(SURE))
        q.append(found.logit(row.targets) - found.normalizer)
        p.append(expected.logit(row.targets) - expected.normalizer)
    return _result(layout, limits, finite, *(np.concatenate(parts) for parts in (kl, same, sure, q, p)))


def _result(
    layout: str, limits: Quality, finite: bool, kl: Array, same: Array, sure: Array, q: Array, p: Array
) -> QualityResult:
    result = QualityResult(
        layout,
        len(kl),
        float(kl.mean()),
        float(kl.max()),
        float(same.mean()),
        int(sure.sum()),
        float(same[sure].mean()) if sure.sum() >= FEWEST_SURE else None,
        float(np.exp(-q.mean())),
        float(np.exp(-p.mean())),
    )
    result.failures.extend(_failures(result, limits, finite))
    return result


def _failures(result: QualityResult, limits: Quality, finite: bool) -> list[str]:
    if not finite:
        return ["the logits hold NaN or infinite numbers"]
    ratio = result.perplexity / result.reference_perplexity
    failures = []
    if not result.mean_kl <= limits.mean_kl:
        failures.append(f"mean KL divergence {result.mean_kl:.3g} nats (allowed {limits.mean_kl})")
    if not ratio <= limits.perplexity_ratio:
        failures.append(f"perplexity {ratio:.3f} times the reference's (allowed {limits.perplexity_ratio})")
    if result.sure_top1 is not None and not result.sure_top1 >= limits.sure_top1:
        failures.append(
            f"the likeliest token is the reference's in {result.sure_top1:.1%} of the {result.sure} positions where "
            f"that is sure (needed {limits.sure_top1:.0%})"
        )
    return failures
