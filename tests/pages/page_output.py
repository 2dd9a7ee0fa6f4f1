"""Whether an output is the one on the page.

What is different each time is not compared: times of day, numbers with a unit of time or size, and hashes. `...` on the
page stands for anything.
"""

from __future__ import annotations

import re

_UNITS = r"(?:s|ms|us|MB|GB|KB|kB|MiB|GiB|KiB|bytes|tok/s|tokens/s)"
_ALWAYS = (
    (re.compile(r"\b\d\d:\d\d:\d\d\b"), "12:00:00"),
    (re.compile(rf"(?<![\w.])\d[\d.,\u202f ]*? ?({_UNITS})(?![\w/])"), r"# \1"),
    (re.compile(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{12,64}\b(\.\.\.)?"), "HASH"),
)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?=x?(?!\w))")
_RULES = re.compile(r"[─━┄┅]+")


def normalised(text: str, *, numbers_vary: bool = False) -> str:
    """`text` without what is different each time, and without blanks at the ends of its lines."""
    for pattern, plain in _ALWAYS:
        text = pattern.sub(plain, text)
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    if numbers_vary:
        # the width of a column follows from the numbers in it
        lines = [_RULES.sub("─", re.sub(r" +", " ", _NUMBER.sub("#", line))).rstrip() for line in lines]
    return "\n".join(lines).strip("\n")


def agrees(expected: str, found: str, *, numbers_vary: bool = False) -> bool:
    """Whether `found` is what the page says, `...` being anything."""
    first, *others = normalised(expected, numbers_vary=numbers_vary).split("...")
    text = normalised(found, numbers_vary=numbers_vary)
    if not others:
        return text == first
    # each part where it comes first: with a regular expression a long output that differs would take for ever
    place = len(first)
    for part in others[:-1]:
        begin = text.find(part, place)
        if begin < 0:
            return False
        place = begin + len(part)
    return text.startswith(first) and text.endswith(others[-1]) and place + len(others[-1]) <= len(text)
