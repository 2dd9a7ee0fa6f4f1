"""N-gram speculation (prompt lookup): guess the next tokens from what the text already holds.

A draft is what followed the latest earlier occurrence of the last few tokens. It is checked in one call, and a token of
it is accepted only where it is what the sampler picks anyway, so it changes the time that a text takes and never the
text.

Reference: https://github.com/apoorvumang/prompt-lookup-decoding (the idea).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter

import numpy as np

from doge_deploy.bundle.manifest import Manifest
from doge_deploy.runtime.base import FloatArray, Runner
from doge_deploy.runtime.rows import RowsRunner

LONGEST, SHORTEST = 4, 2
"""Tokens of the n-gram that is looked for; a longer one is looked for first."""

DRAFTS = (1, 3, 7)
"""Lengths of a draft that are considered: calls of 2, 4 and 8 tokens."""


class NgramIndex:
    """The n-grams of one text: where each was last followed by something.

    One more token and a draft take the same time however long the text is.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        """The place behind the latest occurrence that has a token behind it."""
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, token: int) -> None:
        """One more token of the text. In texts where nothing repeats, this is most of what guessing costs."""
        end = len(self._tokens)
        for length in range(SHORTEST, LONGEST + 1):
            if end >= length:
                self._places[tuple(self._tokens[end - length : end])] = end
        self._tokens.append(token)

    def extend(self, tokens: Iterable[int]) -> None:
        """More tokens of the text."""
        for token in tokens:
            self.append(token)

    def draft(self, length: int) -> list[int]:
        """At most `length` tokens that followed the last n-gram before; empty where it is new."""
        end = len(self._tokens)
        for size in range(min(LONGEST, end), SHORTEST - 1, -1):
            place = self._places.get(tuple(self._tokens[end - size : end]))
            if place is not None:
                period = end - place  # a text that repeats itself goes on doing so
                return [self._tokens[place + step % period] for step in range(length)]
        return []


class DraftLength:
    """How many tokens to guess, from how often guesses were right and what a longer call costs.

    Args:
        costs: time of a call of Q tokens with all their logits over that of one token, by Q; must hold 1.
    """

    GAIN = 1.1
    """A draft is made only where it is expected to be this much faster than none."""
    PROBE_EVERY = 64
    """Where drafts do not pay, one of the shortest length is tried once in so many tokens."""

    def __init__(self, costs: Mapping[int, float]) -> None:
        self._costs = dict(costs)
        self._rate = 0.6
        """Of drafted tokens, the share that was right; a running mean, at first a guess that allows a trial."""
        self._since_probe = 0

    def choose(self) -> int:
        """Tokens to guess now; 0 for none."""
        best, gain = 0, self.GAIN
        for length in DRAFTS:
            cost = self._costs.get(length + 1)
            if cost is None:
                continue
            tokens = sum(self._rate**k for k in range(length + 1))
            if tokens / cost > gain:
                best, gain = length, tokens / cost
        if best:
            return best
        self._since_probe += 1
        if self._since_probe >= self.PROBE_EVERY and DRAFTS[0] + 1 in self._costs:
            self._since_probe = 0
            return DRAFTS[0]
        return 0

    def measured(self, width: int, seconds: float, one: float) -> None:
        """What a call of `width` tokens took where one of a single token takes `one`."""
        before = self._costs.get(width, seconds / one)
        self._costs[width] = before + 0.2 * (seconds / one - before)

    def learn(self, drafted: int, accepted: int) -> None:
        """What became of a draft: the tokens behind the first wrong one say nothing."""
        for right in [True] * accepted + [False] * (accepted < drafted):
            self._rate += 0.1 * (right - self._rate)


USUAL_COSTS = {1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4}
"""Of a call of Q tokens over one token, by Q, where nothing was measured yet."""


def exact_length(manifest: Manifest) -> int:
    """Tokens that a row can hold before it drops a key: up to there a guess can be taken back."""
    facts, length = manifest.facts, manifest.max_length
    exact = min(facts.keep_window_size, length) if facts.keep_window(length) else length
    return exact if facts.sliding_window is None else min(exact, facts.sliding_window - 1)


class Guesser:
    """Guesses for the texts in the one row of a runner, one text after another.

    What longer calls cost is learned from the calls themselves, so nothing has to be measured before a first text.

    Args:
        runner: one that `can_guess` is true for.
        exact: see `exact_length`.
    """

    def __init__(self, runner: RowsRunner, exact: int) -> None:
        self._runner, self._exact = runner, exact
        self._lengths = DraftLength(USUAL_COSTS)
        self._index = NgramIndex()
        self._one: float | None = None
        """Seconds of a call of one token, a running mean."""
        self._widths: set[int] = set()
        """Of calls that were made: the first of each is slower than those that follow."""
        self.drafted = self.accepted = 0
        """Tokens that were guessed so far, and how many of them were what the sampler picked."""

    def begin(self, tokens: Sequence[int]) -> None:
        """A text begins with these."""
        self._index = NgramIndex(tokens)

    def append(self, token: int) -> None:
        """It goes on with this."""
        self._index.append(token)

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens that may follow; often none."""
        room = min(most, self._exact - int(self._runner.row_lengths[0]) - 1)
        length = min(self._lengths.choose(), room)
        return self._index.draft(length) if length > 0 else []

    def feed(self, ids: Sequence[int]) -> FloatArray:
        """Feed the last token and a draft; logits `[Q, V]`, one row for each of them."""
        start = perf_counter()
        width = len(ids)
        tokens = np.array([ids], np.int64)
        logits: FloatArray
        if width == 1:  # the very call of a text without guesses, which costs less of Python's time
            logits = self._runner.run(tokens)[0]
        else:
            last = width if self._runner.last_logits else 1
            logits = self._runner.run_rows(0, tokens, np.array([width]), last).numpy()[0]
        seconds = perf_counter() - start
        if width not in self._widths:
            self._widths.add(width)
        elif width == 1:
            self._one = seconds if self._one is None else self._one + 0.05 * (seconds - self._one)
        elif self._one is not None:
            self._lengths.measured(width, seconds, self._one)
        return logits

    def learn(self, drafted: int, accepted: int) -> None:
        """What became of a draft."""
        self.drafted += drafted
        self.accepted += accepted
        self._lengths.learn(drafted, accepted)

    def cut(self, tokens: int) -> None:
        """The row holds its first `tokens` only."""
        if int(self._runner.row_lengths[0]) > tokens:
            self._runner.truncate_row(0, tokens)


def guesser_for(runner: Runner, manifest: Manifest) -> Guesser | None:
    """None where a call gives the logits of one token only, or what a token gets depends on its call."""
    if not isinstance(runner, RowsRunner) or runner.whole_calls:
        return None
    gives_all = runner.many_logits or not runner.last_logits
    return Guesser(runner, exact_length(manifest)) if gives_all else None
