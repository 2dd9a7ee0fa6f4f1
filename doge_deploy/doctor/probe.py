"""Libraries of this machine, each loaded in a process of its own.

A vendor's library that is half installed may fail, abort or hang while it is loaded. In a child process that is a
finding like any other. The children run side by side, so all of them take as long as the slowest one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 20.0
"""A library that is not loaded by then counts as one that hangs."""


@dataclass(frozen=True)
class Library:
    """A Python package that something needs."""

    module: str
    distributions: tuple[str, ...]
    """Names under which it is installed; the first that is found gives the version."""
    code: str = ""
    """What a child process runs after the import, to fill the dictionary `found`; empty: the library is not loaded."""


LIBRARIES: Mapping[str, Library] = {
    "onnxruntime": Library(
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu"),
        "found['providers'] = module.get_available_providers()",
    ),
    "tensorrt_rtx": Library(
        "tensorrt_rtx",
        ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        "module.Builder",  # the native part is there
    ),
    "tensorrt": Library("tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "module.Builder"),
    "cuda.core": Library("cuda.core", ("cuda-core",), "module.Device"),
    "triton": Library("triton", ("triton", "triton-windows"), "module.compile"),
    "torch": Library("torch", ("torch",)),
    "transformers": Library("transformers", ("transformers",)),
    "onnxscript": Library("onnxscript", ("onnxscript",)),
}
"""Those without `code` are large and known to load where they are installed: their presence is enough."""


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


def probe_libraries(libraries: Mapping[str, Library] = LIBRARIES, timeout_s: float = TIMEOUT_S) -> dict[str, Found]:
    """Look at all of them."""
    children = {
        name: _start(library) for name, library in libraries.items() if library.code and _is_there(library.module)
    }
    deadline = time.monotonic() + timeout_s
    found = {}
    for name, library in libraries.items():
        if name in children:
            found[name] = _finish(children[name], library, max(deadline - time.monotonic(), 0.0), timeout_s)
        else:
            found[name] = Found(_version(library) or "unknown" if _is_there(library.module) else None)
    return found


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, AttributeError, ValueError):  # the parent of a dotted name is missing, or is no package
        return False


def _version(library: Library) -> str | None:
    for name in library.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _start(library: Library) -> subprocess.Popen[str]:
    script = (
        "import importlib, json\n"
        f"module = importlib.import_module({library.module!r})\n"
        "found = {'version': str(getattr(module, '__version__', ''))}\n"
        f"{library.code}\n"
        "print(json.dumps(found))\n"
    )
    # The current directory must not be searched: a file called tensorrt.py in it would be found before the library.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
    )


def _finish(child: subprocess.Popen[str], library: Library, wait_s: float, timeout_s: float) -> Found:
    version = _version(library) or "unknown"
    try:
        output, errors = child.communicate(timeout=wait_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return Found(version, f"does not load within {timeout_s:.0f} s")
    if child.returncode != 0:
        return Found(version, _last_words(child.returncode, errors))
    try:
        details = json.loads(output.strip().splitlines()[-1])
        return Found(details.pop("version") or version, details=details)
    except (ValueError, IndexError, KeyError, AttributeError):
        return Found(version, f"answers {output.strip()[-80:]!r} when it is loaded")


def _last_words(returncode: int, errors: str) -> str:
    """The exception of a child that failed, or the signal of one that was ended."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if returncode < 0:
        try:
            name = signal.Signals(-returncode).name
        except ValueError:
            name = f"signal {-returncode}"
        return f"ends its process with {name} when it is loaded" + (f": {lines[-1][:200]}" if lines else "")
    return lines[-1][:300] if lines else f"ends its process with exit code {returncode} when it is loaded"


def run_tool(command: Sequence[str], timeout_s: float = 5.0) -> str | None:
    """Standard output of a command; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
