"""Which request has which slot, and what the slots hold: prefixes are used again between turns and between users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_PART = 64
"""Tokens that are compared at a time: most pairs of texts part early."""


@dataclass
class Held:
    """One slot of the runner."""

    slot: int
    tokens: list[int] = field(default_factory=list)
    """What the runner's row holds, in order."""
    busy: bool = False
    used: int = 0
    """When it was last used, as a count."""


@dataclass(frozen=True)
class Match:
    """The slot that begins as a prompt does."""

    held: Held
    tokens: int
    """How many first tokens are the same."""


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens are the same."""
    length = min(len(left), len(right))
    for start in range(0, length, _PART):
        ours, theirs = left[start : start + _PART], right[start : start + _PART]
        if ours != theirs:
            for place, (one, other) in enumerate(zip(ours, theirs, strict=False), start):
                if one != other:
                    return place
    return length


class SlotTable:
    """Bookkeeping of the slots; it never touches the runner."""

    def __init__(self, slots: Sequence[int]) -> None:
        self._held = {slot: Held(slot) for slot in slots}
        self._clock = 0

    def __getitem__(self, slot: int) -> Held:
        return self._held[slot]

    @property
    def busy(self) -> int:
        """Slots that a request has."""
        return sum(held.busy for held in self._held.values())

    @property
    def tokens(self) -> int:
        """Tokens that all slots hold, those kept for their prefix too."""
        return sum(len(held.tokens) for held in self._held.values())

    def all(self) -> list[Held]:
        """Every slot, in order."""
        return list(self._held.values())

    def free(self) -> list[Held]:
        """Slots without a request, the least recently used first; empty ones before those that hold a prefix."""
        idle = [held for held in self._held.values() if not held.busy]
        return sorted(idle, key=lambda held: (bool(held.tokens), held.used, held.slot))

    def take(self, held: Held) -> None:
        """Give the slot to a request."""
        self._clock += 1
        held.busy, held.used = True, self._clock

    def give_back(self, held: Held) -> None:
        """The request is done; what the slot holds stays there for prompts that begin with it."""
        self._clock += 1
        held.busy, held.used = False, self._clock

    def best_match(self, prompt: Sequence[int], among: Sequence[Held] | None = None) -> Match | None:
        """The slot whose tokens begin as `prompt` does for longest, at most up to the token before its last.

        Args:
            prompt: its last token is always fed again: its logits are needed.
            among: slots that are looked at; all where None.
        """
        best: Match | None = None
        for held in self._held.values() if among is None else among:
            length = min(common_prefix(held.tokens, prompt), len(prompt) - 1)
            if length and (best is None or length > best.tokens):
                best = Match(held, length)
        return best
