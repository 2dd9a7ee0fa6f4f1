"""What a bisection found, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from doge_deploy.errors import MismatchError

WEIGHT, PASS, TRACE, OPTION, PACKAGE = "weight", "pass", "trace", "option", "package"


@dataclass
class Culprit:
    """What makes the difference between GOOD and BAD."""

    kind: str
    """`weight`, `pass`, `trace` (the standard graph itself), `option` (the two are not of one kind) or `package`."""
    name: str
    """Of the tensor, the pass, the option, or the packages."""
    where: str
    """`static, layer 1, stage q`; empty where it has no place."""
    difference: float
    """Largest difference that it makes: of the stage on the same input, or of the outputs."""
    detail: str
    notes: list[str] = field(default_factory=list)

    def refuse(self, good: Path, bad: Path) -> NoReturn:
        """Raises MismatchError: BAD does not compute what GOOD computes."""
        raise MismatchError(f"{bad} does not compute what {good} computes: {self.kind} {self.name}")

    def lines(self) -> list[str]:
        """In words, a line each."""
        where = f" ({self.where})" if self.where else ""
        first = f"the {self.kind} {self.name}{where} makes the difference: {self.detail}"
        return [first, *(f"  {note}" for note in self.notes)]
