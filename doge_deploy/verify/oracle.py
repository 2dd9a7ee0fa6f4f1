"""The cut between the judge and what it judges by.

`parity.Judge` runs a bundle and compares; everything that it asks about the reference, it asks an `Oracle`. There is
one judge, and it does not know which oracle it has: `live.LiveOracle` runs transformers, with the checkpoint, in this
process; a recording holds what that one once answered, so that neither torch nor transformers nor the checkpoint is
needed where a bundle is judged.

Whoever has another question about the reference adds a method here, answers it in `live.py`, and says what a recording
must hold for it, or that it has no answer. This module and those that the judge stands on (`run` and all that it
imports at once) import neither torch nor transformers nor onnx; tests/test_architecture.py holds that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from doge_deploy.runtime.base import IntArray
from doge_deploy.verify.cases import Case
from doge_deploy.verify.compare import Difference, Distribution
from doge_deploy.verify.noise import Noise
from doge_deploy.verify.replay import CandidateTrace, Replay, Selections

if TYPE_CHECKING:
    from doge_deploy.bundle.opening import Bundle
    from doge_deploy.verify.runners import Runners


@dataclass(frozen=True)
class WeightsResult:
    """What a comparison of the weight file with the checkpoint found."""

    compared: int
    """Tensors of the weight file."""
    failures: tuple[str, ...]
    """A line per tensor that differs or is missing."""

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass
class SelfDifference:
    """How far transformers is from itself when the same text comes in other calls."""

    prefill_against_decode: float
    """Largest absolute difference of logits."""
    scale: float
    """Largest absolute logit."""


@dataclass(frozen=True)
class HeldOut:
    """A row of the text by which quantized weights are judged, and what the checkpoint's own weights make of it."""

    case: Case
    targets: IntArray
    """`[T]`: the tokens that are predicted, in order."""
    expected: Distribution
    """Of these T positions."""


class Expected(ABC):
    """A case as the reference computes it, for a bundle that made given choices."""

    gap: float
    """Smallest distance, over rows and layers, between the last that the reference chose and the first that it did not;
    infinite where it chose nothing."""
    epsilon: Mapping[str, float]
    """Per `kept.<layer>` and `experts.<layer>`: how far a selection may be from a best one, by noise."""
    differing: int
    """Rows in which the bundle chose another set than the reference."""
    violation: Mapping[str, float]
    """Per `kept.<layer>` and `experts.<layer>`: how far the bundle's choice is from a best one."""

    @abstractmethod
    def followed(self) -> Expected:
        """The same by the bundle's choices in place of the reference's own.

        Asked only where `Oracle.follows`, or where there is nothing to choose.
        """

    @abstractmethod
    def difference(self, name: str, found: CandidateTrace) -> Difference:
        """A tensor of the bundle (`logits`, `last_hidden_state`, `present.<layer>.key` ...) against the reference's.

        Raises:
            ValueError: shapes differ.
        """

    @abstractmethod
    def noise(self, name: str, *, more: bool) -> Noise:
        """Of the reference's arithmetic in that tensor; with `more`, of several draws together."""

    @abstractmethod
    def distribution(self, positions: str) -> Distribution:
        """What the reference gives for the tokens of the case: of `all` positions that have logits, or of the `last` of
        each call and row.
        """


class Judged(Protocol):
    """A layout of a bundle, as an oracle sees it: what runs it and how its calls are made in the reference."""

    layout: str
    runners: Runners
    replay: Replay

    def selects(self, case: Case) -> bool:
        """Whether the bundle chooses keys or experts in this case."""


class Oracle(AbstractContextManager["Oracle"]):
    """The reference, as a judge may ask it. A context manager: what is asked, is asked within."""

    name: str
    """Who it is, for people: `transformers`."""
    follows: bool
    """It can be run with another's selections, so that a choice among ties can be judged by certificate."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to give back."""

    @property
    def description(self) -> str | None:
        """For people: which recording it is, and what made it; None where the reference runs here."""
        return None

    def check_layouts(self, bundle: Bundle, layouts: Sequence[str]) -> None:
        """Raises UnsupportedModelError where nothing is known of one of the layouts."""
        return

    def prepare(self, layouts: Sequence[Judged]) -> None:
        """Told which layouts are going to be judged, before any case: what can be begun, may be."""
        return

    @abstractmethod
    def weights(self, bundle: Bundle) -> WeightsResult:
        """Every number of the bundle's weight file against the checkpoint."""

    @abstractmethod
    def itself(self) -> SelfDifference | None:
        """How far the reference is from itself, prefill against decode; None for a task without a cache."""

    @abstractmethod
    def case_names(self) -> Sequence[str]:
        """Names of the cases to judge, in order."""

    @abstractmethod
    def case(self, name: str, judged: Judged) -> Case | str:
        """The calls of a case for a layout, or why there are none."""

    @abstractmethod
    def expected(self, layout: str, replay: Replay, case: Case, given: Sequence[Selections] | None) -> Expected:
        """What the reference makes of a case.

        Args:
            layout: of the bundle.
            replay: how its calls are made.
            case: one that `case` gave.
            given: what the bundle selected in each call; None where it selects nothing, or does not show what.
        """

    @abstractmethod
    def held_out(self, layout: str, replay: Replay, max_length: int) -> Sequence[HeldOut]:
        """The text for judging quantized weights, in rows of at most `max_length` tokens."""

    def forget(self) -> None:
        """Drop what was kept for the last case; the next one follows."""
