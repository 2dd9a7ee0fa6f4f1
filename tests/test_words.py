"""Docs, help texts, messages and docstrings are in plain English: none of these words and phrases.

Each was in use here, and a reader who is not a native speaker, or is in a hurry, had to guess what it means. The right
column says what to write instead.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WORDS = {
    r"held against|\bholds? (it|them|this|that|[A-Z]\w*) against": "compared with",
    r"(takes?|by) the same door": "registers through the same entry point",
    r"\bits last words\b": "its last lines",
    r"\bto be had\b|\bcan be had\b|\bhad of (any|all)\b": "available",
    r"\ball that(?= (goes|comes|stands|lies|there))\b": "everything that",
    r"\b(were|was) thought through\b": "supported",
    r"\b(slow )?twins?\b": "reference implementation",
    r"\bon paper\b": "calculated",
    r"\bwhose move\b": "who can mend it",
    r"\band (its|their) kin\b": "and similar ones",
    r"\bcounted kindly\b": "with assumptions in its favour",
    r"\bof before\b": "from before, the earlier",
    r"\b(later|other|every|each|which|graph) rooms?\b|\brooms? (that|may|to its|imports?)\b": "package",
    r"\bsays? (all )?(of|about all of) itself\b": "about itself",
    r"\bfor want of\b": "because ... is missing",
    r"\bheeds?\b": "respects",
    r"\bbut for (an?|the|one|near|rows|those|expert|that)\b": "except",
    r"\bat hand\b": "available",
    r"\bto blame\b": "at fault",
    r"\bone a (core|CPU|line|row|file)\b|\ba line a file\b": "one per",
    r"\bwill do too\b": "works too",
    r"\bof theirs\b": "their",
    r"\bthe words of\b(?= the (vendor|library))": "its message",
    r"\bwhat is to be done about\b": "how to",
    r"\bto be believed\b": "its text shows only that the model runs",
    r"\bparts? from its reference\b(?!\])": "differs from",
    r"\btells (a|the) \w+'s fault\b": "shows whether",
    r"\bchose among ties\b": "had tied scores",
    r"\bit is let alone\b|\bis let in\b": "is allowed",
    r"\bwants `": "needs",
}
"""Regular expressions, in any case, and what to write instead."""

PAGES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "*.md", "action.yml", ".github/*.yml", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
]
SOURCES = [path for folder in ("doge_deploy", "plugins") for path in sorted((ROOT / folder).rglob("*.py"))]

QUOTED = {"CHANGELOG.md": "entries of released versions stay as they were written"}


def strings(path: Path) -> list[tuple[int, str]]:
    """Every text in a source with its line: docstrings, help, messages; the fixed parts of f-strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]


def found(text: str) -> list[str]:
    """The private words in a text, each with what to write."""
    plain = " ".join(text.split())
    return [
        f"{match[0]!r}: write {instead!r}"
        for pattern, instead in WORDS.items()
        for match in re.finditer(pattern, plain, re.IGNORECASE)
    ]


def test_pages() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {one}"
        for path in PAGES
        if path.name not in QUOTED
        for one in found(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_help_messages_and_docstrings() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {one}"
        for path in SOURCES
        for line, text in strings(path)
        for one in found(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "A package of your own takes the same door.",
        "The reference that the bundle is\nheld against.",
        "The last lines of its log, and its last words.",
        "Features can be had of any checkpoint.",
        "a file for each device that was thought through",
        "111 rows chose among ties",
    ],
)
def test_a_private_word_is_found(text: str) -> None:
    assert found(text)
