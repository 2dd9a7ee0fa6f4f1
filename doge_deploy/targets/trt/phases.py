"""TensorRT's progress: phases within phases, as one fraction that never falls."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The phases that are under way. A step of a phase is as long as all phases that run within it.

    Reference: `IProgressMonitor` in TensorRT's API: names are unique among the phases under way.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._highest = 0.0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, step: int) -> None:
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None:
                self._highest = 1.0

    def fraction(self) -> float:
        """Of the outermost phase, 0 to 1."""
        with self._lock:
            roots = [name for name, phase in self._phases.items() if phase.parent is None]
            found = max((self._of(name) for name in roots), default=0.0)
            self._highest = max(self._highest, found)
            return self._highest

    def _of(self, name: str) -> float:
        phase = self._phases[name]
        children = [self._of(child) for child, other in self._phases.items() if other.parent == name]
        return min(1.0, (phase.done + min(max(children, default=0.0), 1.0)) / phase.steps)
