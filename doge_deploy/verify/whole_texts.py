"""The wider reference reads a text in one call, whatever calls the text comes in.

Where nothing is selected or routed, where RoPE is that of any length and no window slides, the calls of a text change
nothing but roundings, and those of float64 are nine digits below the noise that is measured with it. So cases of the
same text, or of its beginning, share one run. The reference in the bundle's own dtype is always given the very calls.

Axes: Q tokens of a call, T of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from doge_deploy.runtime.base import IntArray
from doge_deploy.verify.ahead import Ahead
from doge_deploy.verify.cases import Case, Limits
from doge_deploy.verify.compare import Array
from doge_deploy.verify.reference import Reference, ReferenceRows
from doge_deploy.verify.reference_run import ReplayTrace
from doge_deploy.verify.replay import Replay


@dataclass(frozen=True)
class TextRun:
    """What a reference makes of a text."""

    logits: Array
    """`[n, V]`: of its last n tokens."""
    present: dict[str, Array]
    """`[Hkv, T, D]` each."""
    length: int
    """T."""

    def trace(self, case: Case, *, last: bool) -> ReplayTrace:
        """The run as the calls of a case that is its beginning would show it; `last`: a call has one row of logits."""
        ends = np.cumsum([call.input_ids.shape[1] for call in case.calls]).tolist()
        starts = [end - 1 for end in ends] if last else [0, *ends[:-1]]
        first = self.length - len(self.logits)
        return ReplayTrace(
            logits=[self.logits[start - first : end - first] for start, end in zip(starts, ends, strict=True)],
            present={name: [tensor[:, : ends[-1]]] for name, tensor in self.present.items()},
        )


def text_of(case: Case) -> IntArray | None:
    """`[T]`: all tokens of a case of one row; None where it has several."""
    if any(len(call.lengths) > 1 for call in case.calls):
        return None
    return np.concatenate([call.input_ids[0] for call in case.calls])


def first_logit(case: Case, *, last: bool) -> int:
    """The first token of a case that has logits; `last`: only that at the end of a call."""
    return case.calls[0].input_ids.shape[1] - 1 if last else 0


@dataclass(frozen=True)
class Asked:
    """A text, and which of its logits."""

    ids: bytes
    """`[T]` int64."""
    first: int
    """The first token whose logits are wanted."""

    @property
    def text(self) -> IntArray:
        return np.frombuffer(bytearray(self.ids), np.int64)  # torch takes none that is read-only


class WholeTexts:
    """Runs of one reference, of which the last is kept.

    Args:
        reference: in a dtype whose roundings do not matter.
        cases: that may be asked for, none of which selects; of those with the same beginning the longest text is run.
    """

    def __init__(self, reference: Reference, cases: Iterable[Case]) -> None:
        self.reference = reference
        self._cases = [(text, case) for case in cases if (text := text_of(case)) is not None]
        self._kept: tuple[Asked, TextRun] | None = None

    @staticmethod
    def apply(reference: Reference, limits: Limits) -> bool:
        """Whether the calls of a text in which nothing is selected do not matter: of a dense language model in float64,
        without a sliding window and a RoPE that changes.
        """
        facts = reference.facts
        plain = not facts.is_moe and facts.sliding_window is None and limits.original_length is None
        return plain and reference.dtype == "float64" and reference.task == "causal-lm"

    def asked(self, replay: Replay, case: Case) -> Asked | None:
        """What is to be run for a case; None where its calls matter: it has several rows, or drops keys."""
        text = text_of(case)
        if text is None or replay.tokenwise or self.reference.facts.keep_window(len(text)):
            return None
        longest = text
        for planned, _ in self._cases:
            if len(planned) > len(longest) and np.array_equal(planned[: len(longest)], longest):
                longest = planned
        sharing = [other for planned, other in self._cases if np.array_equal(planned, longest[: len(planned)])]
        first = min(first_logit(one, last=replay.last_logits) for one in (case, *sharing))
        return Asked(longest.astype(np.int64).tobytes(), first)

    def run(self, asked: Asked, ahead: Ahead | None) -> TextRun:
        """The run, made here where `ahead` has not made it."""
        if self._kept is None or self._kept[0] != asked:
            self._kept = None  # before the next is made: one alone is held
            found = None if ahead is None else ahead.take(asked)
            self._kept = asked, run_text(self.reference, asked) if found is None else found
        return self._kept[1]


def run_text(reference: Reference, asked: Asked) -> TextRun:
    """A text in one call."""
    text = asked.text
    rows = ReferenceRows(reference, 1, "right")
    (logits,), watch = rows.run(text[None], np.array([len(text)]), last=len(text) - asked.first)
    present = {name: tensors[0].double().numpy() for name, tensors in rows.present(watch.scores).items()}
    return TextRun(logits.double().numpy(), present, len(text))
