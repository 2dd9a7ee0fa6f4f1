"""Run the examples of docs/serve.md, block by block from top to bottom, as a reader would; exit with 1 if one differs.

    python run_page.py BIN NODE [PAGE]

BIN is the folder of `doge-deploy`; NODE one with the installed packages of node/. What is run is the page's own text:

- `console`: each command in bash, in one folder for the whole page. A command goes on in lines that begin with four
  blanks. What stands below it is its output, in which `...` is anything and a time of day is any; where nothing stands
  there, only the exit code is compared.
- `python`, `javascript`: all blocks of a section share their names. A `text` block that follows is what they print.
- `doge-deploy serve ...` begins a server that runs until the next one on its port; it must then end with exit code 0.
- A block below `<!-- not run: REASON -->` is not run.

Ports 8000 and up become free ones in the page and in the files of examples/05_serve, which lie in the folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serve.md"
FILES = ROOT / "examples" / "05_serve"

PORTS = range(8000, 8003)
"""As the page and the files write them."""

SECONDS = 120
"""For one command or one start."""

_LANGUAGES = ("console", "python", "javascript", "text", "sh")


class PageError(Exception):
    """The page is not what this program can run."""


@dataclass(frozen=True)
class Block:
    """A fenced block of the page."""

    language: str
    text: str
    line: int
    section: str
    not_run: str | None
    """The reason, where it stands above the block."""
    output: str | None = None
    """Of a `python` or `javascript` block: the `text` block that follows it."""


@dataclass(frozen=True)
class Command:
    """A command of a `console` block, and what stands below it."""

    text: str
    output: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page, `text` ones joined to those before them.

    Raises:
        PageError: a language is not known.
    """
    found: list[Block] = []
    section, last_end = "", -1
    fence = re.compile(
        r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
    )
    for match in fence.finditer(page):
        line = page.count("\n", 0, match.start("text")) + 1
        language, text = match["language"], match["text"]
        headings = re.findall(r"^#{2,3} (.+)$", page[: match.start()], re.M)
        section = headings[-1] if headings else ""
        if language not in _LANGUAGES:
            raise PageError(f"line {line}: a block of language {language!r}; known: {', '.join(_LANGUAGES)}")
        if language == "text" and found and not page[last_end : match.start()].strip():
            before = found.pop()
            found.append(Block(before.language, before.text, before.line, before.section, before.not_run, text))
        else:
            found.append(Block(language, text, line, section, match["reason"]))
        last_end = match.end()
    for block in found:
        if block.language in ("text", "sh") and block.not_run is None:
            raise PageError(f"line {block.line}: cannot be run; say why with <!-- not run: REASON --> above it")
    return found


def commands(text: str) -> list[Command]:
    """The commands of a `console` block.

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


def agrees(expected: str, found: str) -> bool:
    """Whether an output is the one on the page; see the head of this file."""

    def lines(text: str) -> str:
        plain = re.sub(r"\b\d\d:\d\d:\d\d\b", "12:00:00", text)
        return "\n".join(line.rstrip() for line in plain.strip().splitlines())

    first, *others = lines(expected).split("...")
    text = lines(found)
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


@dataclass
class Runner:
    """Runs blocks in one folder."""

    folder: Path
    bin: Path
    node: Path
    ports: dict[int, int]
    servers: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    names: dict[str, dict[str, object]] = field(default_factory=dict)
    """Of the Python of each section."""
    failures: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    ran: int = 0

    def page(self, text: str) -> None:
        """Run a page."""
        found = blocks(substituted(text, self.ports))
        for index, block in enumerate(found):
            where = f"docs/serve.md:{block.line}"
            if block.not_run:
                self.not_run.append(f"{where}: not run: {block.not_run}")
                continue
            try:
                if block.language == "console":
                    self._console(block, where)
                elif block.language == "python":
                    self._python(block, where)
                else:
                    self._javascript([one for one in found[:index] if _belongs(one, block)], block, where)
            except PageError:
                raise
            except Exception as error:
                self.failures.append(f"{where}: {type(error).__name__}: {error}")

    def stop(self) -> None:
        """End all servers."""
        for port in list(self.servers):
            self._stop(port)

    def _console(self, block: Block, where: str) -> None:
        for command in commands(block.text):
            if command.text.startswith("doge-deploy serve "):
                self._serve(command, where)
                continue
            done = subprocess.run(
                ["bash", "-c", command.text],
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
            )
            output = done.stdout.decode()
            if done.returncode:
                self.failures.append(f"{where}: $ {command.text}\nexit code {done.returncode}\n{output}")
            else:
                self._compare(f"{where}: $ {command.text}", command.output or None, output)

    def _serve(self, command: Command, where: str) -> None:
        given = re.search(r"--port (\d+)", command.text)
        port = int(given[1]) if given else self.ports[8000]
        self._stop(port)
        log = self.folder / f"log.{len(list(self.folder.glob('log.*')))}"
        text = command.text if given else f"{command.text} --port {port}"
        with log.open("wb") as stream:
            self.servers[port] = subprocess.Popen(
                ["bash", "-c", f"exec {text}"], cwd=self.folder, env=self._environment(), stderr=stream
            )
        deadline = time.monotonic() + SECONDS
        while "serving" not in log.read_text():
            if self.servers[port].poll() is not None or time.monotonic() > deadline:
                raise PageError(f"$ {command.text}\ndid not begin:\n{log.read_text()}")
            time.sleep(0.05)
        self._compare(f"{where}: $ {command.text}", command.output, log.read_text().splitlines()[0])

    def _stop(self, port: int) -> None:
        server = self.servers.pop(port, None)
        if server is None:
            return
        server.send_signal(signal.SIGTERM)
        code = server.wait(SECONDS)
        if code:
            self.failures.append(f"the server on port {port} ended with exit code {code}")

    def _python(self, block: Block, where: str) -> None:
        output = io.StringIO()
        names = self.names.setdefault(block.section, {"__name__": "__main__"})
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(output):
            exec(compile(block.text, where, "exec", dont_inherit=True), names)
        self._compare(where, block.output, output.getvalue())

    def _javascript(self, before: Sequence[Block], block: Block, where: str) -> None:
        mark = "-- here begins the block --"
        script = self.node / "block.mjs"
        script.write_text("".join(one.text for one in before) + f'console.log("{mark}");\n' + block.text)
        done = subprocess.run(["node", str(script)], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            self.failures.append(f"{where}: {done.stderr}")
        else:
            self._compare(where, block.output, done.stdout.split(f"{mark}\n", 1)[1])

    def _compare(self, where: str, expected: str | None, found: str) -> None:
        self.ran += 1
        if expected is not None and not agrees(expected, found):
            self.failures.append(f"{where}\n--- the page\n{expected}\n--- now\n{found}")

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


def _belongs(one: Block, block: Block) -> bool:
    """To the JavaScript that `block` continues."""
    return (one.section, one.language, one.not_run) == (block.section, "javascript", None)


def substituted(text: str, ports: dict[int, int]) -> str:
    """`text` with other ports."""
    return re.sub(r"(?<!\d)(80\d\d)(?!\d)", lambda match: str(ports.get(int(match[1]), int(match[1]))), text)


def free_ports(count: int) -> Iterator[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        found = [one.getsockname()[1] for one in sockets]
    yield from found


def main(arguments: Sequence[str]) -> int:
    """Run the page; the exit code."""
    bin_folder, node = Path(arguments[0]).resolve(), Path(arguments[1]).resolve()
    page = Path(arguments[2]) if len(arguments) > 2 else PAGE
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in FILES.iterdir():
            if file.is_file():
                (folder / file.name).write_text(substituted(file.read_text(), ports))
                shutil.copymode(file, folder / file.name)
        runner = Runner(folder, bin_folder, node, ports)
        try:
            runner.page(page.read_text(encoding="utf-8"))
        except PageError as error:
            runner.failures.append(str(error))
        finally:
            runner.stop()
    for line in [*runner.not_run, *runner.failures]:
        print(line, flush=True)
    print(f"{runner.ran} examples of {page.name} were run, {len(runner.failures)} failed")
    return bool(runner.failures or not runner.ran)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
