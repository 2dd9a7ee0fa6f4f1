"""What a recording holds. The annotations are the schema of its document; texts of 64 digits name tensors by hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from doge_deploy.bundle.typed_json import Check

KIND = "doge-deploy recording 1"

Hash = Annotated[str, Check("a sha256", lambda text: len(text) == 64 and set(text) <= set("0123456789abcdef"))]
Count = Annotated[int, Check("a whole number >= 1", lambda number: number >= 1)]
Amount = Annotated[float, Check("a number >= 0", lambda number: number >= 0)]
Shape = tuple[Annotated[int, Check("a whole number >= 0", lambda number: number >= 0)], ...]


@dataclass(frozen=True)
class RecordedNoise:
    """See `doge_deploy.verify.noise.Noise`."""

    max_abs: Amount
    rms: Amount
    scale: Amount
    effective: Amount
    draws: Count = 1


@dataclass(frozen=True)
class RecordedTensor:
    """One tensor of a case."""

    shapes: Annotated[tuple[Shape, ...], Check("a list of at least one shape", lambda shapes: len(shapes) > 0)]
    """Of every row, `[H, n, D]`, before any number was left out."""
    step: Count
    """One number in how many is held, see `places.py`."""
    values: Hash
    """The held numbers of all rows, one after another, in the dtype of the bundle."""
    noise: RecordedNoise
    """Of one draw."""
    more: RecordedNoise
    """Of several together."""


@dataclass(frozen=True)
class Likeliest:
    """Tokens of every position that are held whatever else is left out; axes: T positions, m tokens."""

    ids: Hash
    """`[T, m]` int32: the likeliest, and those that a text goes on with."""
    logits: Hash
    """`[T, m]`."""
    normalizer: Hash
    """`[T]` float64: logarithm of the sum of the exponentials of all logits."""


@dataclass(frozen=True)
class RecordedLogits:
    """Logits `[1, T, V]` of a text, maybe in part."""

    shape: Shape
    step: Count
    values: Hash
    likeliest: Likeliest | None
    """None where nothing is left out."""


@dataclass(frozen=True)
class RecordedCall:
    """One call of a case."""

    ids: Hash
    """`[B, Q]` int64."""
    lengths: Hash
    """`[B]` int64."""
    choices: Mapping[str, Hash] = field(default_factory=dict)
    """Per `kept.<layer>` and `experts.<layer>` what the reference selected, see `Choices.digests`."""


@dataclass(frozen=True)
class RecordedCase:
    """One case of a layout."""

    name: str
    layout: str
    exact: bool
    calls: Annotated[tuple[RecordedCall, ...], Check("a list of at least one call", lambda calls: len(calls) > 0)]
    gap: Amount | None
    """None where nothing is selected."""
    epsilon: Mapping[str, Amount]
    output: RecordedLogits
    """Logits, or last hidden states, of all calls."""
    output_rows: tuple[Count, ...]
    """Positions of each call and row among them."""
    output_noise: RecordedNoise
    output_more: RecordedNoise
    present: Mapping[str, RecordedTensor]


@dataclass(frozen=True)
class RecordedText:
    """A row of the text for judging quantized weights."""

    calls: tuple[RecordedCall, ...]
    targets: Hash
    """`[T]` int64."""
    expected: RecordedLogits


@dataclass(frozen=True)
class RecordedSelf:
    """See `SelfDifference`."""

    prefill_against_decode: Amount
    scale: Amount


@dataclass(frozen=True)
class Recording:
    """The document."""

    subject: Mapping[str, Any]
    """What it is a recording of, see `subject.py`."""
    reference: str
    """Who was recorded: `transformers`."""
    made_with: Mapping[str, str]
    """Libraries and their versions."""
    bundle: Hash
    """sha256 of the list of files of the bundle that it was made beside."""
    weights: Mapping[str, Hash]
    """sha256 of every tensor of the weight file."""
    itself: RecordedSelf | None
    layouts: tuple[str, ...]
    names: tuple[str, ...]
    """Of the cases, in order."""
    left_out: Mapping[str, str]
    """Cases that have no recording, as `<layout>/<case>`, with the reason."""
    cases: tuple[RecordedCase, ...]
    held_out: Mapping[str, tuple[RecordedText, ...]] = field(default_factory=dict)
    """By layout, where weights are quantized."""
