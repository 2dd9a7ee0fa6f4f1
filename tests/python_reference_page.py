"""docs/python-reference.md, made from the docstrings of the public names.

python tests/python_reference_page.py          # writes the page
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import doge_deploy
from doge_deploy import api

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "python-reference.md"

HEAD = """# Python reference

Written by `python tests/python_reference_page.py` from the docstrings; a test fails when this page is stale.
[Use it from Python](python-api.md) has examples. Everything here is a name of the package `doge_deploy`.
"""

_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):$", re.MULTILINE)
_ENTRY = re.compile(r"^(?P<names>[\w*, ]+): (?P<text>.*)$", re.DOTALL)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def definition(name: str) -> ast.FunctionDef | ast.ClassDef:
    """The source of a public name."""
    value = getattr(api, name)
    module = importlib.import_module(value.__module__)
    tree = ast.parse(Path(inspect.getsourcefile(module) or "").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise LookupError(name)


def prose(text: str) -> str:
    """A docstring without its sections, as paragraphs."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n") if paragraph.strip())


def entries(text: str) -> list[str]:
    """The entries of a section, a list item each."""
    found: list[str] = []
    for line in inspect.cleandoc(text).splitlines():
        if line.startswith("  ") and found:
            found[-1] += f" {line.strip()}"
        elif line.strip():
            found.append(line.strip())
    items = []
    for entry in found:
        match = _ENTRY.match(entry)
        items.append(f"- `{match['names']}`: {match['text']}" if match else f"- {entry}")
    return items


def described(docstring: str | None) -> str:
    """A docstring in Markdown."""
    head, *rest = _SECTION.split(inspect.cleandoc(docstring or ""))
    found = [prose(head)]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        found += [f"**{title}**", "\n".join(entries(body)) if title != "Returns" else prose(inspect.cleandoc(body))]
    return "\n\n".join(part for part in found if part)


def signature(node: Function, name: str | None = None) -> str:
    """A call as it is written, an argument a line where it is long."""
    call = ast.unparse(node.args).removeprefix("self, ").removeprefix("self")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{name or node.name}({call}){returns}"
    if len(line) > 100:
        parts = [ast.unparse(ast.parse(f"def f({call}): ...").body[0].args)]  # type: ignore[attr-defined]
        pieces = re.split(r", (?=[*\w]+(?::|,|=|$))(?![^\[]*\])", parts[0])
        pieces = [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", piece) for piece in pieces]
        line = f"{name or node.name}(\n    " + ",\n    ".join(pieces) + f",\n){returns}"
    return f"<!-- shown: a signature -->\n```text\n{line}\n```"


def fields(node: ast.ClassDef) -> list[str]:
    """Annotated attributes with what stands below them; of a pydantic model with its description."""
    found = []
    model = getattr(getattr(api, node.name), "model_fields", {})
    for place, item in enumerate(node.body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name) or item.target.id[0] == "_":
            continue
        below = node.body[place + 1] if place + 1 < len(node.body) else None
        text = ""
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            text = f": {' '.join(below.value.value.split())}"
        default = "" if item.value is None else f" = {ast.unparse(item.value)}"
        if field := model.get(item.target.id):
            default = f" = {field.default!r}"
            text = f": {field.description}.{text.removeprefix(':')}"
        found.append(f"- `{item.target.id}: {ast.unparse(item.annotation)}{default}`{text}")
    return found


def methods(node: ast.ClassDef) -> list[str]:
    """Public methods and properties with a docstring."""
    found = []
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name[0] != "_" and ast.get_docstring(item):
            found.append(f"### {node.name}.{item.name}\n\n{signature(item)}\n\n{described(ast.get_docstring(item))}")
    return found


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name in doge_deploy.__all__:
        node = definition(name)
        if isinstance(node, ast.FunctionDef):
            parts.append(f"## {name}\n\n{signature(node)}\n\n{described(ast.get_docstring(node))}")
        else:
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            text = [f"## {name}", f"A class ({bases})." if bases else "A class.", described(ast.get_docstring(node))]
            attributes = fields(node)
            text += ["**Attributes**", "\n".join(attributes)] if attributes else []
            parts.append("\n\n".join([part for part in text if part] + methods(node)))
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
