"""What the numbers were measured on: processor, caches, versions, memory of a process, neighbours.

Everything here is read from Linux's /proc and /sys; elsewhere it is None and the report says so.
Reference: proc(5), sysfs-devices-system-cpu.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

from doge_deploy.devices.host import available_cpus, kilobytes_field, processor_name, read_text

_PACKAGES = ("doge-deploy", "onnxruntime", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class BenchHost:
    """Where and with what."""

    system: str
    processor: str
    cpus: int
    """CPUs that this process may use."""
    last_level_cache_bytes: int | None
    memory_bytes: int | None
    versions: dict[str, str]


def this_machine() -> BenchHost:
    """The machine that this runs on."""
    return BenchHost(
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        processor=processor_name(),
        cpus=available_cpus(),
        last_level_cache_bytes=_last_level_cache(),
        memory_bytes=kilobytes_field(Path("/proc/meminfo"), "MemTotal"),
        versions={name: version for name in _PACKAGES if (version := _version(name))},
    )


class NeighbourClock:
    """How much of the machine others used since it was made."""

    def __init__(self) -> None:
        self._start = (perf_counter(), process_time(), _busy_seconds())

    def share(self) -> float | None:
        """CPU time of everyone but this process over that of all CPUs, 0 to 1; time stolen by a hypervisor counts.

        Linux counts in steps of 10 ms, so add up many sections before believing it.
        """
        wall, own, busy = self._start
        busy_now = _busy_seconds()
        if busy is None or busy_now is None:
            return None
        others = (busy_now - busy) - (process_time() - own)
        return max(others / ((perf_counter() - wall) * (os.cpu_count() or 1)), 0.0)


def _busy_seconds() -> float | None:
    """CPU time that all processes together have used since the machine started, waiting left out."""
    text = read_text(Path("/proc/stat"))
    if text is None:
        return None
    fields = text.split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _last_level_cache() -> int | None:
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", file.read_text(encoding="ascii").strip())
        if found:
            sizes.append(int(found[1]) * {"K": 1 << 10, "M": 1 << 20}[found[2]])
    return max(sizes, default=None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
