"""Judging quantized weights: how much a bundle's predictions differ from those of the checkpoint.

Two questions are kept apart. Whether the graph computes what its stored weights say is parity, judged on the standard
graph against a reference with the same dequantized weights. What the rounding of the weights costs is judged here, on
the graph that is served, against the reference with the checkpoint's own weights.

Axes: T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from doge_deploy.bundle.opening import Bundle
from doge_deploy.checkpoint import Checkpoint
from doge_deploy.graph.weight_file import read_weight_file
from doge_deploy.graph.weight_formats import Quality, WeightFormat
from doge_deploy.runtime.base import BundleRunner, IntArray
from doge_deploy.verify.cases import Case, chunk
from doge_deploy.verify.compare import Array, log_softmax
from doge_deploy.verify.reference import Reference, Weights
from doge_deploy.verify.replay import Replay

SURE = 0.5
"""Probability from which on the reference is sure of a token."""

FEWEST_SURE = 10
"""Positions that must be sure before the share of equal tokens among them says anything."""

ROW_TOKENS = 128
"""Tokens of the text in one row."""


def stored_weights(bundle: Bundle, checkpoint: Checkpoint, weight_format: WeightFormat) -> Weights:
    """What a bundle stores of its checkpoint's weights: per tensor in the format, the numbers that its graph makes."""

    def dequantized(name: str, _weight: torch.Tensor) -> torch.Tensor:
        return weight_format.dequantized(checkpoint.read(name))

    found = (weight_format.part_of(name, info.dtype) for name, info in read_weight_file(bundle.path).items())
    names = sorted({part.tensor for part in found if part is not None and part.tensor})
    # another tensor is a finding of `compare_weights`
    return {name: partial(dequantized, name) for name in names if name in checkpoint.tensors}


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

    @property
    def passed(self) -> bool:
        return not self.failures


def judge_quality(
    layout: str, limits: Quality, runner: BundleRunner, reference: Reference, replay: Replay, text_ids: IntArray
) -> QualityResult:
    """Feed text to both sides, in rows: half a row as a prefill, then token by token.

    Args:
        layout: of the runner.
        limits: what rounding may cost in the format of the weights.
        runner: the graph that is served.
        reference: with the checkpoint's own weights, in float32.
        replay: how the layout's calls are made in the reference.
        text_ids: `[T]`.
    """
    width = min(ROW_TOKENS, runner.max_length)
    found, expected, targets = [], [], []
    for start in range(0, max(1, len(text_ids) - width + 1), width):
        row = text_ids[start : start + width]
        half = max(1, len(row) // 2)
        case = Case("held-out text", chunk([row], [[half]] + [[1]] * (len(row) - half)), exact=False)
        found.append(_logits(replay.feed(runner, case).logits))
        expected.append(_logits(replay.run(reference, case).logits))
        given = len(row) - len(found[-1]) + 1  # tokens before the first that is predicted
        targets.append(row[given:])
        found[-1], expected[-1] = found[-1][: len(targets[-1])], expected[-1][: len(targets[-1])]
    return _compare(layout, limits, *(np.concatenate(parts) for parts in (found, expected, targets)))


def _logits(parts: list[Array]) -> Array:
    return np.concatenate(parts)


def _compare(layout: str, limits: Quality, found: Array, expected: Array, targets: Array) -> QualityResult:
    p, q = log_softmax(expected), log_softmax(found)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    best = p.argmax(axis=-1)
    same = q.argmax(axis=-1) == best
    sure = p.max(axis=-1) >= np.log(SURE)
    rows = np.arange(len(targets))
    result = QualityResult(
        layout,
        len(targets),
        float(kl.mean()),
        float(kl.max()),
        float(same.mean()),
        int(sure.sum()),
        float(same[sure].mean()) if sure.sum() >= FEWEST_SURE else None,
        float(np.exp(-q[rows, targets].mean())),
        float(np.exp(-p[rows, targets].mean())),
    )
    result.failures.extend(_failures(result, limits, bool(np.isfinite(found).all())))
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
