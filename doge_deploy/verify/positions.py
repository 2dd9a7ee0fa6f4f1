"""Where in a case the logits differ, and by how much: for people who look, nothing is judged by it.

Axes: T positions that have logits, V vocabulary, m of its tokens that are known of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from doge_deploy.verify.cases import Case
from doge_deploy.verify.compare import Array, Distribution

BLOCK = 16
"""Positions that are compared at a time, so that no array of float64 is as large as all logits."""

SAMPLED = 200
"""Logits of a case that are kept for a picture, evenly spaced; the worst of each position comes on top."""

WORST = 100
"""Positions of which the worst logit is kept."""

FIRST_BIN, LAST_BIN = -16, 4
"""Decades of the histogram."""


@dataclass(frozen=True)
class Positions:
    """The positions of a case, each with what was predicted there; all of length T."""

    call: tuple[int, ...]
    row: tuple[int, ...]
    index: tuple[int, ...]
    """Of the token in its row."""
    token: tuple[int, ...]
    """That was fed there."""
    expected: tuple[int, ...]
    """The reference's likeliest next token."""
    found: tuple[int, ...]
    """The bundle's."""
    error: tuple[float, ...]
    """Largest absolute difference of a logit; infinite where one is not finite."""

    @property
    def first_divergence(self) -> int | None:
        """The first position with another likeliest token."""
        pairs = enumerate(zip(self.expected, self.found, strict=True))
        return next((number for number, (a, b) in pairs if a != b), None)


@dataclass(frozen=True)
class Sample:
    """Some logits of a case, and how all errors are distributed."""

    expected: tuple[float, ...]
    """Logits of the reference."""
    found: tuple[float, ...]
    """The bundle's, of the same tokens at the same positions."""
    histogram: tuple[int, ...]
    """Absolute errors in half decades from 10^`FIRST_BIN` to 10^`LAST_BIN`; smaller and larger ones in the outer."""
    equal: int
    """Logits that are the same number."""
    compared: int


def locate(case: Case, logits: Sequence[Array], expected: Distribution, *, last: bool) -> tuple[Positions, Sample]:
    """Compare logits position by position.

    Args:
        case: the calls.
        logits: the bundle's, per call and row `[tokens, V]`, the last tokens of each call.
        expected: the reference's of the same positions.
        last: only the last position of each call and row is compared.

    Returns:
        The positions, and a sample of their logits.
    """
    places = list(_places(case, [1 if last else len(rows) for rows in logits]))
    found = np.concatenate([rows[-1:] if last else rows for rows in logits])
    errors, best, pairs = [], [], _Pairs(len(found) * expected.ids.shape[1])
    for start in range(0, len(found), BLOCK):
        rows = slice(start, start + BLOCK)
        own = found[rows].astype(np.float64)
        known = np.take_along_axis(own, expected.ids[rows], axis=1)
        reference = expected.logits[rows].astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.where(np.isfinite(known), np.abs(known - reference), np.inf)
        errors += error.max(axis=1).tolist()
        best += np.where(np.isfinite(own), own, -np.inf).argmax(axis=1).tolist()
        pairs.add(reference, known, error)
    call, row, index, token = zip(*places, strict=True)
    positions = Positions(
        call, row, index, token, tuple(map(int, expected.best)), tuple(map(int, best)), tuple(map(float, errors))
    )
    return positions, pairs.sample()


def _places(case: Case, counts: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Call, row, index in the row, and token of each position, of which every call and row has `counts`."""
    done = [0] * len(case.calls[0].lengths)
    entries = ((number, call, b) for number, call in enumerate(case.calls) for b in range(len(call.lengths)))
    for count, (number, call, b) in zip(counts, entries, strict=True):
        length = int(call.lengths[b])
        for offset in range(length - count, length):
            yield number, b, done[b] + offset, int(call.input_ids[b, offset])
        done[b] += length


class _Pairs:
    """Collects a sample of `total` pairs."""

    def __init__(self, total: int) -> None:
        self._step = max(1, math.ceil(total / SAMPLED))
        self._seen = 0
        self._even: list[tuple[float, float]] = []
        self._worst: list[tuple[float, float, float]] = []
        self._counts = np.zeros(2 * (LAST_BIN - FIRST_BIN), np.int64)
        self._equal = 0

    def add(self, reference: Array, found: Array, error: Array) -> None:
        """Of some positions, all `[T, m]`."""
        flat = slice(-self._seen % self._step, None, self._step)
        self._even += zip(reference.ravel()[flat].tolist(), found.ravel()[flat].tolist(), strict=True)
        self._seen += reference.size
        for a, b, amount in zip(reference, found, error, strict=True):
            worst = int(amount.argmax())
            self._worst.append((float(amount[worst]), float(a[worst]), float(b[worst])))
        differing = error[error > 0]
        self._equal += error.size - differing.size
        decades = np.log10(np.minimum(differing, 10.0**LAST_BIN))
        bins = np.clip(np.floor(2 * (decades - FIRST_BIN)), 0, len(self._counts) - 1).astype(np.int64)
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def sample(self) -> Sample:
        worst = sorted(self._worst, reverse=True, key=lambda one: one[0])[:WORST]
        pairs = [pair for pair in (*self._even, *((a, b) for _, a, b in worst)) if math.isfinite(sum(pair))]
        return Sample(
            tuple(a for a, _ in pairs),
            tuple(b for _, b in pairs),
            tuple(self._counts.tolist()),
            self._equal,
            self._seen,
        )
