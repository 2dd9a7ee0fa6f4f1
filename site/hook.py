"""What mkdocs does not do by itself: pages from outside docs/, links between them, and the list of decisions.

The pages of the repository are written for its own file view: a link leads to a file, wherever that is. In the site
README.md is the first page, and every other page of the repository that is linked from a page stands below
`repository/`, with the files that it links to. So there is one text, and its links work in both places.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.resolve()
DOCS = ROOT / "docs"

_LINK = re.compile(r"(?P<before>\]\(|\b(?:src|srcset|href)=\")(?P<target>[^)\s\"]+)(?P<after>\)|\")")
_CODE = re.compile(r"^(?P<fence>`{3,}).*?^(?P=fence)\s*$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.M | re.S)
_OPTION = re.compile(r"(?P<other><(pre|svg|script|style)\b.*?</\2>|<[^>]*>)|(?<![\w-])(?P<option>--?[a-z][\w-]*)", re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the entry `Decisions` of the navigation from the files."""
    _fill(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, the pages that can be reached from the pages, and the files that these link to."""
    waiting = [ROOT / "README.md", *(Path(str(file.abs_src_path)) for file in files.documentation_pages())]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if files.get_file_from_path(uri(path)) is None:
            files.append(File.generated(config, uri(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            waiting += [target for target in targets(path) if target.is_file()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    path = Path(str(page.file.abs_src_path))

    def link(found: re.Match[str]) -> str:
        target = resolved(path, found["target"])
        if target is None:
            return found[0]
        if not target.is_file():
            raise PluginError(f"{path.relative_to(ROOT)}: {found['target']} leads to no file")
        anchor = found["target"].partition("#")[1] + found["target"].partition("#")[2]
        where = relpath(uri(target), str(PurePosixPath(page.file.src_uri).parent))
        if found["before"] != "](":  # mkdocs rewrites links of Markdown, and none of HTML
            where = relpath(uri(target), str(PurePosixPath(page.file.dest_uri).parent))
        return f"{found['before']}{where}{anchor}{found['after']}"

    # a file view needs a backslash before a bar in the code of a table, and Python-Markdown would show it
    plain = re.sub(
        r"^\|.*$",
        lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0]),
        markdown,
        flags=re.M,
    )
    return outside_code(plain, lambda text: _LINK.sub(link, text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep browsers from breaking a line within `--option`, and let them break one between the choices of an option."""

    def word(found: re.Match[str]) -> str:
        return found[0] if found["other"] else f'<span class="option">{found["option"]}</span>'

    def code(found: re.Match[str]) -> str:
        return found[0].replace("|", "|<wbr>")

    return _OPTION.sub(word, re.sub(r"<code>[^<]*</code>", code, html))


def uri(path: Path) -> str:
    """The place of a file of the repository in the site."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"repository/{path.relative_to(ROOT).as_posix()}"


def resolved(page: Path, target: str) -> Path | None:
    """The file that a link of a page leads to; None for an address and for a place on the same page."""
    name = target.partition("#")[0]
    if not name or re.match(r"[a-z]+:", target):
        return None
    path = (page.parent / name).resolve()
    return path / "README.md" if path.is_dir() else path


def targets(page: Path) -> list[Path]:
    """The files that a page links to."""
    found: list[Path] = []

    def look(text: str) -> str:
        found.extend(path for match in _LINK.finditer(text) if (path := resolved(page, match["target"])) is not None)
        return text

    outside_code(page.read_text(encoding="utf-8"), look)
    return found


def outside_code(markdown: str, change: Any) -> str:
    """`markdown` with `change` applied to everything that is not code."""
    parts: list[str] = []
    place = 0
    for code in _CODE.finditer(markdown):
        parts += [change(markdown[place : code.start()]), code[0]]
        place = code.end()
    return "".join([*parts, change(markdown[place:])])


def _fill(nav: Any) -> None:
    for entry in nav if isinstance(nav, list) else []:
        for title, value in entry.items() if isinstance(entry, dict) else []:
            if title == "Decisions":
                pages = sorted(path for path in (DOCS / "decisions").glob("0*.md"))
                entry[title] = [*value, *({_title(path): uri(path)} for path in pages)]
            else:
                _fill(value)


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
