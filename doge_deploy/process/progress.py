"""How a long command reports what it is doing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Takes the stages of a command in their order, each with an amount of work."""

    def stage(self, name: str, total: int = 1) -> Callable[[int], None]:
        """Start a stage of `total` units; returns what is to be called with units done."""


class _NoProgress:
    def stage(self, name: str, total: int = 1) -> Callable[[int], None]:
        return lambda done: None


NO_PROGRESS: Progress = _NoProgress()
"""Shows nothing."""
