"""What Linux says about the machine and about memory, in one place; elsewhere the answers are None.

Reference: proc(5).
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str | None:
    """A file of /proc, /sys or /etc; None where it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def kilobytes_field(path: Path, name: str) -> int | None:
    """Bytes of the line `NAME:  123 kB`, as /proc/meminfo and /proc/PID/status have them."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", read_text(path) or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def processor_name(root: Path = ROOT) -> str:
    """The processor as /proc/cpuinfo calls it, or what Python knows of it."""
    found = re.search(r"^model name\s*: (.+)$", read_text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown"


def platform_name() -> str:
    """Operating system and processor as an engine's record has them: `linux-x86_64`, `linux-aarch64`."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()}-{_PROCESSORS.get(machine, machine)}"


_PROCESSORS = {"amd64": "x86_64", "arm64": "aarch64"}
"""What Windows and macOS call them -> what Linux does."""


def memory_bytes() -> int | None:
    """Resident memory of this process now."""
    return kilobytes_field(ROOT / "proc/self/status", "VmRSS")


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far, libraries and mapped files included.

    On Linux not `getrusage`: its figure survives exec there, so a small child of a large parent would show the
    parent's. Where there is neither /proc nor getrusage (Windows), None.
    """
    status = ROOT / "proc/self/status"
    if status.exists():
        return kilobytes_field(status, "VmHWM")
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_cpus() -> int:
    """CPUs that this process may use: what `taskset` left of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
