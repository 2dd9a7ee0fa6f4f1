"""Words of error messages: the nearest legal name, and many findings in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

MAX_FINDINGS = 20
"""Findings that are spelled out in one message; the others are counted."""


_LONGEST_FINDING = 600
"""Characters; of a longer one the middle is left out, so that a value as long as a book stays one readable line."""


def suggest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name that is nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def join_findings(findings: Sequence[str], limit: int = MAX_FINDINGS) -> str:
    """All findings in one line, those after the first `limit` as a number."""
    shown = "; ".join(shortened(finding) for finding in findings[:limit])
    rest = len(findings) - limit
    return f"{shown}; and {rest} more" if rest > 0 else shown


def shortened(finding: str) -> str:
    """`finding` without its middle, if it is longer than a reader would want."""
    if len(finding) <= _LONGEST_FINDING:
        return finding
    end = _LONGEST_FINDING // 3
    return f"{finding[: 2 * end]} [...] {finding[-end:]}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there was no memory; libraries in C++ say so in words alone."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


_OUT_OF_MEMORY = re.compile("bad[_ ]alloc|(can't|failed to|not) allocate memory|out of memory", re.IGNORECASE)
