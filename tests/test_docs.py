"""Links of the documentation lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page for page in ROOT.rglob("*.md") if not {".venv", "venv", ".nox", "build"} & set(page.relative_to(ROOT).parts)
)
DECISIONS = ROOT / "docs" / "decisions"


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    assert not broken


def test_every_decision_has_a_number_of_its_own_and_is_listed() -> None:
    names = [path.name for path in sorted(DECISIONS.glob("*.md"))]
    numbers = [name.split("-")[0] for name in names]
    assert len(set(numbers)) == len(numbers)
    listed = re.findall(r"\(decisions/([^)]+)\)", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert sorted(listed) == names
