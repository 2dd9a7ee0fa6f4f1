"""What Linux says about the machine and about memory, in one place; elsewhere the answers are None.

Reference: proc(5).
"""

from __future__ import annotations

import os
import platform
import re
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


def available_cpus() -> int:
    """CPUs that this process may use: what `taskset` left of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
