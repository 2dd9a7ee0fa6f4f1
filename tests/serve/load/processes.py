"""`doge-deploy serve` as a process of its own, and what the system says about it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LOG = "serve.log"


@dataclass(frozen=True)
class Use:
    """What a process holds and has used."""

    memory_mib: float
    """Resident memory."""
    peak_mib: float
    """The most that it was."""
    files: int
    threads: int
    cpu_seconds: float


@dataclass(frozen=True)
class ServerProcess:
    """A server that runs."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def use(self) -> Use:
        """What it holds now (Linux)."""
        return use_of(self.process.pid)


def use_of(pid: int) -> Use:
    """What a process holds now (Linux)."""
    folder = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in folder.joinpath("status").read_text().splitlines())
    times = folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()
    return Use(
        memory_mib=int(status["VmRSS"].split()[0]) / 1024,
        peak_mib=int(status["VmHWM"].split()[0]) / 1024,
        files=len(os.listdir(folder / "fd")),
        threads=int(status["Threads"]),
        cpu_seconds=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
    )


def forget_peak(pid: int) -> None:
    """Measure the peak from now on."""
    Path("/proc", str(pid), "clear_refs").write_text("5")


@contextlib.contextmanager
def serving(bundles: Sequence[Path], *options: str, nice: int = 0) -> Iterator[ServerProcess]:
    """A server for `bundles` on a free port; it is killed at the end if it is still there."""
    command = ["-m", "doge_deploy.cli", "serve", *map(str, bundles), "--port", "0", "--threads", "1", *options]
    log = Path(tempfile.mkdtemp(prefix="doge-serve-"), LOG)
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["nice", "-n", str(nice), sys.executable, *command], stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        yield ServerProcess(process, _address(process, log), log)
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    while process.poll() is None:
        if found := re.search(r"serving address=(http://\S+)", log.read_text()):
            return found[1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    raise RuntimeError(f"the server did not start: {log.read_text()}")


def export_bundles(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Bundles of doge-tiny by name: `fp32`, `int8`, `all` (logits of every token) or `features`."""
    options = {
        "fp32": [],
        "int8": ["--quantize", "int8"],
        "all": ["--logits", "all"],
        "features": ["--task", "features"],
    }
    found = {}
    for name in names:
        found[name] = folder / name
        if not found[name].exists():
            command = [sys.executable, "-m", "doge_deploy.cli", "export", "doge-tiny", "-o", str(found[name])]
            subprocess.run([*command, *options[name]], check=True, stdout=subprocess.DEVNULL)
    return found
