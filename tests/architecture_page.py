"""The section "Files" of docs/architecture.md, made from the first line of each module.

python tests/architecture_page.py          # writes the section
"""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files -->\n", "<!-- end of files -->\n"


def first_line(path: Path) -> str:
    """What a module says of itself."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path} has no docstring"
    return docstring.splitlines()[0]


def modules() -> list[Path]:
    """Every module of the package and of the plugins."""
    return [path for folder in ("doge_deploy", "plugins") for path in sorted((ROOT / folder).rglob("*.py"))]


def section() -> str:
    """One table a folder."""
    lines = []
    for folder, paths in groupby(
        sorted(modules(), key=lambda path: (path.parent, path.name)), lambda path: path.parent
    ):
        found = list(paths)
        init = folder / "__init__.py"
        name = folder.relative_to(ROOT)
        lines += ["", f"**`{name}/`** {first_line(init)}", "", "| file | |", "| --- | --- |"]
        lines += [f"| `{path.name}` | {first_line(path)} |" for path in found if path != init]
        if found == [init]:
            del lines[-3:]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n\n"


def page(text: str) -> str:
    """The page with the section as it should be."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + section() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
