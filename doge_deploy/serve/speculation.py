"""N-gram speculation (prompt lookup): guess the next tokens from what the text already holds.

A draft is what followed the latest earlier occurrence of the last few tokens. It is checked in one call, and a token of
it is accepted only where it is what the sampler picks anyway, so it changes the time that a text takes and never the
text.

Reference: https://github.com/apoorvumang/prompt-lookup-decoding (the idea).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens of the n-gram that is looked for; a longer one is looked for first."""

DRAFTS = (1, 3, 7)
"""Lengths of a draft that are considered: calls of 2, 4 and 8 tokens."""


class NgramIndex:
    """The n-grams of one text: where each was last followed by something.

    To append a token and to ask for a draft take the same time however long the text is.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        """The place behind the latest occurrence that has a token behind it."""
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token of the text."""
        end = len(self._tokens)
        for length in range(SHORTEST, LONGEST + 1):
            if end >= length:
                self._places[tuple(self._tokens[end - length : end])] = end
        self._tokens.append(token)

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

    def learn(self, drafted: int, accepted: int) -> None:
        """What became of a draft: the tokens behind the first wrong one say nothing."""
        for right in [True] * accepted + [False] * (accepted < drafted):
            self._rate += 0.1 * (right - self._rate)
