"""The order of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def rotated(candidates: Sequence[T], round_number: int) -> list[T]:
    """The order of one round.

    Over 2n rounds of n candidates each stands twice in every place, and follows its neighbours as often as they
    follow it: whatever the one before leaves behind (caches, heat, clock frequency) falls on all alike.
    """
    shift = round_number // 2 % len(candidates)
    order = [*candidates[shift:], *candidates[:shift]]
    return order[::-1] if round_number % 2 else order
