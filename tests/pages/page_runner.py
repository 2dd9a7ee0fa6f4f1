"""Runs the blocks of a page from top to bottom, as a reader would, in one folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from page_blocks import Block, Command, PageError, blocks, commands
from page_output import agrees

SECONDS = 300
"""For one command or one start."""

ERROR = re.compile(r"^doge-deploy: error: ", re.M)


@dataclass
class Runner:
    """Runs blocks.

    - `console`: each command in bash. What stands below it is its output; where nothing stands there, only the exit
      code is compared.
    - `python`, `javascript`: all blocks of a section share their names. A `text` block that follows is what they print.
    - `doge-deploy serve ...` begins a server that runs until the next one on its port. It must then end with code 0.
    """

    folder: Path
    name: str
    """Of the page, for messages."""
    bin: Path
    """The folder of `doge-deploy`."""
    node: Path | None = None
    """A folder with the npm packages that JavaScript imports."""
    ports: dict[int, int] = field(default_factory=dict)
    """Ports of the page, and those that are free."""
    servers: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    names: dict[str, dict[str, object]] = field(default_factory=dict)
    """Of the Python of each section."""
    failures: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    ran: int = 0

    def page(self, text: str, section: str | None = None) -> None:
        """Run a page, or a section of it."""
        found = [block for block in blocks(self.substituted(text)) if section in (None, block.section)]
        for index, block in enumerate(found):
            where = f"{self.name}:{block.line}"
            if block.not_run:
                self.not_run.append(f"{where}: not run: {block.not_run}")
            elif "file" in block.marks:
                path = self.folder / block.marks["file"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            elif block.runs:
                try:
                    self._run(block, found[:index], where)
                except PageError:
                    raise
                except Exception as error:
                    self.failures.append(f"{where}: {type(error).__name__}: {error}")

    def substituted(self, text: str) -> str:
        """`text` with ports that are free."""
        return re.sub(r"(?<!\d)(80\d\d)(?!\d)", lambda match: str(self.ports.get(int(match[1]), int(match[1]))), text)

    def stop(self) -> None:
        """End all servers."""
        for port in list(self.servers):
            self._stop(port)

    def _run(self, block: Block, before: Sequence[Block], where: str) -> None:
        if block.language == "console":
            self._console(block, where)
        elif block.language == "python":
            self._python(block, where)
        else:
            self._javascript([one for one in before if _belongs(one, block)], block, where)

    def _console(self, block: Block, where: str) -> None:
        found = commands(block.text)
        for command in found:
            if re.match(r"doge-deploy serve (?!.*--help)", command.text):
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
            code = block.marks.get("exit code") if command is found[-1] else None
            error = bool(ERROR.search(command.output))
            good = done.returncode == int(code) if code else bool(done.returncode) == error
            if not good:
                self.failures.append(f"{where}: $ {command.text}\nexit code {done.returncode}\n{output}")
            else:
                self._compare(f"{where}: $ {command.text}", command.output or None, output, block)

    def _serve(self, command: Command, where: str) -> None:
        given = re.search(r"--port (\d+)", command.text)
        port = int(given[1]) if given else self.ports[8000]
        self._stop(port)
        log = self.folder / f"log.{len(list(self.folder.glob('log.*')))}"
        text = command.text.removesuffix(" &")
        text = text if given else f"{text} --port {port}"
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
        self._compare(where, block.output, output.getvalue(), block)

    def _javascript(self, before: Sequence[Block], block: Block, where: str) -> None:
        if self.node is None:
            raise PageError(f"{where}: JavaScript needs --node FOLDER")
        mark = "-- here begins the block --"
        script = self.node / "block.mjs"
        script.write_text("".join(one.text for one in before) + f'console.log("{mark}");\n' + block.text)
        done = subprocess.run(["node", str(script)], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            self.failures.append(f"{where}: {done.stderr}")
        else:
            self._compare(where, block.output, done.stdout.split(f"{mark}\n", 1)[1], block)

    def _compare(self, where: str, expected: str | None, found: str, block: Block | None = None) -> None:
        self.ran += 1
        vary = block is not None and "numbers vary" in block.marks
        if expected is not None and not agrees(expected, found, numbers_vary=vary):
            self.failures.append(f"{where}\n--- the page\n{expected}\n--- now\n{found}")

    def _environment(self) -> dict[str, str]:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        # what a page shows is as wide as a page
        environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
        installed = sorted((self.folder / "installed").glob("*"))
        if installed:  # packages of the page, see page_setups.py
            environment["PYTHONPATH"] = os.pathsep.join(map(str, [*installed, self.folder]))
        return environment


def _belongs(one: Block, block: Block) -> bool:
    """To the JavaScript that `block` continues."""
    return one.runs and (one.section, one.language) == (block.section, "javascript")
