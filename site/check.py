"""The built site needs no other host and has every page in its navigation:  python site/check.py build/site

mkdocs has checked links, anchors and the navigation before (`strict` in mkdocs.yml). This looks at what came out.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

LOADED = {"script": "src", "img": "src", "source": "srcset", "iframe": "src", "link": "href"}
"""Elements whose address a browser fetches by itself."""


class Loads(HTMLParser):
    """The addresses that a page makes a browser fetch, and those that it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect one element."""
        values = dict(attrs)
        if tag in LOADED and (address := values.get(LOADED[tag])) and values.get("rel") != "canonical":
            self.loaded.append(address)
        if tag == "a" and (address := values.get("href")):
            self.linked.append(address)


def problems(site: Path) -> list[str]:
    """What is wrong with the site, a line each."""
    found = []
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    reached = {site / "index.html"}
    for path in pages:
        loads = Loads()
        loads.feed(path.read_text(encoding="utf-8"))
        name = path.relative_to(site)
        found += [f"{name}: loads {one}" for one in loads.loaded if one.startswith(("http:", "https:", "//"))]
        for address in [*loads.loaded, *loads.linked]:
            target = address.split("#")[0].split("?")[0]
            if not target or ":" in target.split("/")[0] or target.startswith("/"):
                continue
            other = (path.parent / target).resolve()
            reached.add(other / "index.html" if other.is_dir() else other)
            if not other.exists():
                found.append(f"{name}: {address} leads to no file")
    found += [f"{path.relative_to(site)}: no page links to it" for path in pages if path.resolve() not in reached]
    return found or ([] if len(pages) > 1 else [f"{site} has no pages"])


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    wrong = problems(folder)
    print("\n".join(wrong) or f"{len(list(folder.rglob('*.html')))} pages; nothing is loaded from elsewhere")
    sys.exit(bool(wrong))
