"""Words of error messages: the nearest legal name, and many findings in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MAX_FINDINGS = 20
"""Findings that are spelled out in one message; the others are counted."""


_LONGEST_FINDING = 600
"""Characters; of a longer one the middle is left out, so that a value as long as a book stays one readable line."""


def suggest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name that is nearest to `name`, or an empty string."""
    import difflib  # only what is misspelt waits for it

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def misspelt(name: str, known: Iterable[str]) -> bool:
    """Whether `name` is one or two letters from a known name: changed, left out, put in, or swapped with the next."""
    return any(abs(len(name) - len(other)) <= 2 and 0 < _distance(name, other) <= 2 for other in known)


def _distance(a: str, b: str) -> int:
    """Edits that make `b` of `a`, none of them inside another: the optimal string alignment distance."""
    before, last = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def joined(words: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


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
