"""Libraries of this machine, each loaded in a process of its own.

A vendor's library that is half installed may fail, abort or hang while it is loaded. In a child process that is a
finding like any other. The children run side by side, so all of them take as long as the slowest one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from doge_deploy.process.child import Child, ChildError, ChildTimeoutError, worker_command
from doge_deploy.targets.backend import Backend, Library, loadable

TIMEOUT_S = 20.0
"""A library that is not loaded by then counts as one that hangs."""


TRITON = Library("triton", "plugins", ("triton", "triton-windows"), "module.compile")
EXPORT = (Library("torch", "export"), Library("transformers", "export"), Library("onnxscript", "export"))
"""Those without a probe are large and known to load where they are installed: their presence is enough."""


def by_demand() -> list[Backend[Any]]:
    """The backends that can be loaded, those that build on nothing but the device itself last."""
    return sorted(loadable(), key=lambda backend: backend.build_needs_gpu)


def libraries() -> dict[str, Library]:
    """What any command needs, by the module's name: what runs each backend first, then what backends need besides."""
    rounds = zip_longest(*(backend.libraries for backend in by_demand()))
    needed = [library for each in rounds for library in each if library is not None]
    found: dict[str, Library] = {}
    for library in (*needed, TRITON, *EXPORT):
        found.setdefault(library.key, library)
    return found


@dataclass(frozen=True)
class Found:
    """What was found of a library."""

    version: str | None
    """None: not installed."""
    problem: str = ""
    """Why it does not load, in the library's own words."""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        return self.version is not None and not self.problem


def probe_libraries(wanted: Mapping[str, Library], timeout_s: float = TIMEOUT_S) -> dict[str, Found]:
    """Look at all of them."""
    deadline = time.monotonic() + timeout_s
    children = {name: _start(library) for name, library in wanted.items() if library.probe and _is_installed(library)}
    found = {}
    for name, library in wanted.items():
        if name in children:
            found[name] = _finish(children[name], library, deadline, timeout_s)
        else:
            found[name] = Found(_version(library) or "unknown" if _is_installed(library) else None)
    return found


def _is_installed(library: Library) -> bool:
    return _is_there(library.module) and not (library.shares_module and _version(library) is None)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, AttributeError, ValueError):  # the parent of a dotted name is missing, or is no package
        return False


def _version(library: Library) -> str | None:
    for name in library.distributions or (library.module,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _start(library: Library) -> Child:
    # The current directory must not be searched: a file called tensorrt.py in it would be found before the library.
    child = Child(worker_command("doge_deploy.doctor.probe_worker"), environment={**os.environ, "PYTHONSAFEPATH": "1"})
    child.send({"module": library.module, "code": library.probe})
    return child


def _finish(child: Child, library: Library, deadline: float, timeout_s: float) -> Found:
    version = _version(library) or "unknown"
    with child:
        try:
            details = child.receive(max(deadline - time.monotonic(), 0.0))
            if details is None:
                raise child.failure()
        except ChildTimeoutError:
            return Found(version, f"does not load within {timeout_s:.0f} s")
        except ChildError as error:
            return Found(version, _problem(error))
        try:
            child.finish(max(deadline - time.monotonic(), 1.0))
        except ChildError as error:
            return Found(version, _problem(error))
    return Found(details.pop("version") or version, details=details)


def _problem(error: ChildError) -> str:
    """What became of the child, in the library's own words where it has some."""
    if error.log and error.status:
        return error.log[-1]
    return f"its process {error.reason} when it is loaded" + (f": {error.log[-1]}" if error.log else "")


def run_tool(command: Sequence[str], timeout_s: float = 5.0) -> str | None:
    """Standard output of a command; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
