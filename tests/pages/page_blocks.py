"""The blocks of code of a page, and what the comments above them say about them.

A comment is part of the page's source and is not shown. Above a block it may say:

- `<!-- not run: KIND: WHY -->`: the block is not run. KINDS lists what may stand in the way.
- `<!-- run by: SESSION -->`: another session of nox runs this block; see tests/test_pages.py.
- `<!-- file: NAME -->`: the block is the content of a file, which later commands of the page use.
- `<!-- exit code: N -->`: the last command ends with this code. Where nothing is said, a command whose output has a
  line `doge-deploy: error: ...` must end with another code than 0, and every other one with 0.
- `<!-- shown: WHY -->`: the block is neither a command nor the output of one.
- `<!-- numbers vary -->`: numbers of the output depend on the processor; only their places are compared.

Anywhere on a page `<!-- begins with: NAME, ... -->` names what earlier pages have made; see page_setups.py. A page with
`<!-- page run by: SESSION -->` is run by that session of nox, and not by `nox -s pages`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KINDS = {
    "device": "it needs a GPU, or a board",
    "network": "it needs a host that is not this machine",
    "checkpoint": "it needs a checkpoint that is not part of the package",
    "rights": "it needs the rights of an administrator",
    "environment": "it needs an environment that the tests do not make here; the reason names what does make it",
    "time": "it takes longer than a test may; the reason names what was run instead",
}
"""Why a block is not run."""

RUN = ("console", "python", "javascript")
SHOWN = ("text", "sh", "yaml", "toml", "make", "json", "")

_FENCE = re.compile(
    r"^(?P<comments>(?:[ ]*<!-- [^\n]*? -->\n)*)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```[ ]*$", re.M | re.S
)
_COMMENT = re.compile(r"<!-- (?P<name>[a-z ]+)(?:: (?P<value>.*?))? -->")
_ABOVE = ("not run", "run by", "file", "shown", "exit code", "numbers vary")


class PageError(Exception):
    """The page is not what these programs can run."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    section: str
    marks: dict[str, str] = field(default_factory=dict)
    """What the comments above it say, by name."""
    output: str | None = None
    """Of a `python` or `javascript` block: the `text` block that follows it."""

    @property
    def not_run(self) -> str | None:
        """Why it is not run."""
        return self.marks.get("not run")

    @property
    def runs(self) -> bool:
        """Whether this page's runner executes it."""
        return self.language in RUN and not {"not run", "run by", "file"} & set(self.marks)


@dataclass(frozen=True)
class Command:
    """A command of a `console` block, and what stands below it."""

    text: str
    output: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page, `text` ones joined to those before them.

    Raises:
        PageError: a language, a mark or a kind of reason is not known.
    """
    found: list[Block] = []
    last_end = -1
    for match in _FENCE.finditer(page):
        line = page.count("\n", 0, match.start("text")) + 1
        language, text = match["language"], match["text"]
        headings = re.findall(
            r"^#{2,3} (.+)$", re.sub(r"^```.*?^```", "", page[: match.start()], flags=re.M | re.S), re.M
        )
        if language not in (*RUN, *SHOWN):
            raise PageError(f"line {line}: a block of language {language!r}; known: {', '.join((*RUN, *SHOWN))}")
        if language == "text" and found and found[-1].output is None and not page[last_end : match.start()].strip():
            before = found.pop()
            found.append(Block(before.language, before.text, before.line, before.section, before.marks, text))
        else:
            found.append(Block(language, text, line, headings[-1] if headings else "", _marks(match["comments"], line)))
        last_end = match.end()
    for block in found:
        if block.language in SHOWN and not {"not run", "run by", "file", "shown"} & set(block.marks):
            raise PageError(f"line {block.line}: cannot be run; say why above it, see tests/pages/page_blocks.py")
    return found


def _marks(comments: str, line: int) -> dict[str, str]:
    marks = {match["name"]: match["value"] or "" for match in _COMMENT.finditer(comments)}
    for name in ("begins with", "page run by"):
        marks.pop(name, None)
    for name, value in marks.items():
        if name not in _ABOVE:
            raise PageError(f"line {line}: <!-- {name} --> is not known; known: {', '.join(_ABOVE)}")
        kind, _, why = value.partition(": ")
        if name == "not run" and not (kind in KINDS and why):
            raise PageError(f"line {line}: not run: {value}: a reason begins with one of {', '.join(KINDS)}")
    return marks


def begins_with(page: str) -> list[str]:
    """What a page needs from earlier pages, by name."""
    return [name for value in re.findall(r"<!-- begins with: (.+?) -->", page) for name in value.split(", ")]


def run_by(page: str) -> str | None:
    """The session of nox that runs a page; None for `nox -s pages`."""
    found = re.search(r"<!-- page run by: (.+?) -->", page)
    return found[1] if found else None


def commands(text: str) -> list[Command]:
    """The commands of a `console` block. A command goes on in lines that begin with four blanks.

    Raises:
        PageError: it does not begin with one.
    """
    found: list[tuple[list[str], list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(([line[2:]], []))
        elif not found:
            raise PageError(f"a console block begins with {line!r}, not with a command")
        elif not found[-1][1] and (found[-1][0][-1].endswith("\\") or line.startswith("    ")):
            found[-1][0].append(line)
        else:
            found[-1][1].append(line)
    return [Command("\n".join(lines), "\n".join(output)) for lines, output in found]
