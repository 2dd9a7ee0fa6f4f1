"""What Linux says about the machine and about memory, in one place; elsewhere the answers are None.

Reference: proc(5).
"""

from __future__ import annotations

import math
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


def processor_features(root: Path = ROOT) -> tuple[str, ...]:
    """What the processor can do beyond its architecture, as /proc/cpuinfo calls it; empty where that is not there."""
    found = re.search(r"^(?:flags|Features)\s*: (.+)$", read_text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return tuple(sorted(found[1].split())) if found else ()


def multiplies_bytes(root: Path = ROOT) -> bool:
    """Whether the processor has an instruction for sums of products of bytes (VNNI on x86, dot products on ARM); True
    where that is not known.
    """
    features = set(processor_features(root))
    return not features or bool(features & {"avx512_vnni", "avx_vnni", "asimddp"})


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


def available_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may use: what `taskset` and the CPU quota of its container left of them, at least 1."""
    count, quota = len(_affine_cpus()), cpu_quota(root)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _affine_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def usable_threads(asked: int | None, root: Path = ROOT) -> int:
    """How many threads to give a library that computes.

    `asked`, but no more than there are CPUs for: ONNX Runtime with hundreds of threads too many waits for itself and
    does not end. Where nothing was asked for, one for each core that this process may use: the CPUs of one core share
    what it computes with. A library's own choice knows nothing of quotas, and ONNX Runtime's ties each thread to a
    core, so that one that somebody else uses holds up every step.
    """
    return min(available_cpus(root), _affine_cores(root) if asked is None else asked)


def _affine_cores(root: Path) -> int:
    """Cores with a CPU that this process may use; a CPU of which nothing is known counts as a core.

    Reference: topology/thread_siblings_list of sysfs, in the kernel's admin guide (cputopology).
    """
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({read_text(root / siblings.format(cpu)) or cpu for cpu in _affine_cpus()})


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the process's control groups grant it, the smallest of them; None without a limit.

    Reference: cpu.max of cgroup v2, cpu.cfs_quota_us and cpu.cfs_period_us of v1, in the kernel's admin guide.
    """
    quotas = []
    for group in _groups(root, "cpu"):
        words = (read_text(group / "cpu.max") or "").split()
        if not words:
            period = read_text(group / "cpu.cfs_period_us") or ""
            words = [*(read_text(group / "cpu.cfs_quota_us") or "").split(), *period.split()]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes that this process may still take: what the machine has left, or its control groups if that is less.

    The page cache counts as left where the kernel would give it up first. None where nothing is known.
    """
    left = [kilobytes_field(root / "proc/meminfo", "MemAvailable")]
    for group in _groups(root, "memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _number(group / limit), _number(group / used)
            if most is not None and now is not None:
                found = re.search(rf"^{cache} (\d+)$", read_text(group / "memory.stat") or "", re.MULTILINE)
                left.append(max(0, most - now + (int(found[1]) if found else 0)))
    return min((amount for amount in left if amount is not None), default=None)


def _number(path: Path) -> int | None:
    text = (read_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of the control groups that this process is in, the innermost first: of v2, then of v1's hierarchy.

    A container may see its own group as the root of the hierarchy, or a path that is not there: then the root counts.
    """
    mount = root / "sys/fs/cgroup"
    groups: list[Path] = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = mount / "unified" if (mount / "unified").is_dir() else mount
        elif controller in controllers.split(","):
            base = next((mount / name for name in (controllers, controller) if (mount / name).is_dir()), mount)
        else:
            continue
        inner = base / path.lstrip("/")
        groups += [group for group in (inner, *inner.parents) if group == base or base in group.parents]
    return groups
