"""What a container leaves of a machine, and what is asked of it beyond that."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from bundles import make_bundle

from doge_deploy.devices import host
from doge_deploy.runtime import memory
from hard_inputs.frame import Case, Outcome, command, equal, right, wrong

KIND = "9 resources"

GROUP = "sys/fs/cgroup"

QUOTAS: dict[str, tuple[dict[str, str], float | None]] = {
    "no control groups": ({}, None),
    "v2 without a limit": ({"proc/self/cgroup": "0::/", f"{GROUP}/cpu.max": "max 100000"}, None),
    "v2, docker --cpus 1.5": ({"proc/self/cgroup": "0::/", f"{GROUP}/cpu.max": "150000 100000"}, 1.5),
    "v2, limit of a parent": (
        {"proc/self/cgroup": "0::/a/b", f"{GROUP}/a/b/cpu.max": "max 1", f"{GROUP}/a/cpu.max": "200 100"},
        2.0,
    ),
    "v1, docker --cpus 2.5": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/docker/0123",
            f"{GROUP}/cpu,cpuacct/cpu.cfs_quota_us": "250000",
            f"{GROUP}/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        2.5,
    ),
    "v1 without a limit": (
        {
            "proc/self/cgroup": "3:cpu:/",
            f"{GROUP}/cpu/cpu.cfs_quota_us": "-1",
            f"{GROUP}/cpu/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    "nonsense": ({"proc/self/cgroup": "0::/", f"{GROUP}/cpu.max": "many few"}, None),
}

MEMORY: dict[str, tuple[dict[str, str], int | None]] = {
    "unknown": ({}, None),
    "what the machine has left": ({"proc/meminfo": "MemAvailable:  2048 kB"}, 2 << 20),
    "v2, docker --memory": (
        {
            "proc/meminfo": "MemAvailable:  2048 kB",
            "proc/self/cgroup": "0::/",
            f"{GROUP}/memory.max": "1000",
            f"{GROUP}/memory.current": "900",
            f"{GROUP}/memory.stat": "inactive_file 300",
        },
        400,
    ),
    "v1, docker --memory": (
        {
            "proc/self/cgroup": "9:memory:/docker/0123",
            f"{GROUP}/memory/memory.limit_in_bytes": "1000",
            f"{GROUP}/memory/memory.usage_in_bytes": "900",
        },
        100,
    ),
    "v1 without a limit": (
        {
            "proc/meminfo": "MemAvailable:  2048 kB",
            "proc/self/cgroup": "9:memory:/",
            f"{GROUP}/memory/memory.limit_in_bytes": "9223372036854771712",
            f"{GROUP}/memory/memory.usage_in_bytes": "900",
        },
        2 << 20,
    ),
}


def pretend(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@functools.cache
def bundle() -> Path:
    return make_bundle("doge-tiny", Path(tempfile.mkdtemp()) / "b", num_layers=1)


def threads(count: int) -> Outcome:
    """In this process: that it ends is half of the answer."""
    ended = command("generate", bundle(), "--prompt", "hi", "--max-new-tokens", 2, "--threads", count)
    if ended.code != 0:
        return wrong(f"exit {ended.code}: {ended.errors}")
    return right() if (f"note: --threads {count}" in ended.errors) == (count > host.available_cpus()) else wrong("note")


def too_little_memory(*arguments: object) -> Outcome:
    original = memory.available_memory
    memory.available_memory = lambda root: 1_000_000
    try:
        return command(*arguments).refusal(4, "at least", "1.0 MB")
    finally:
        memory.available_memory = original


def cases() -> list[Case]:
    def quota(files: dict[str, str], expected: float | None) -> Case:
        return lambda folder: equal(host.cpu_quota(pretend(folder, files)), expected)

    def left(files: dict[str, str], expected: int | None) -> Case:
        return lambda folder: equal(host.available_memory(pretend(folder, files)), expected)

    return [
        *(Case(f"CPU quota: {name}", quota(*row)) for name, row in QUOTAS.items()),
        *(Case(f"memory: {name}", left(*row)) for name, row in MEMORY.items()),
        *(Case(f"--threads {count}", lambda folder, count=count: threads(count)) for count in (1, 64, 512, 100_000)),
        Case("generate, too little memory", lambda folder: too_little_memory("generate", bundle(), "--prompt", "hi")),
        Case("verify, too little memory", lambda folder: too_little_memory("verify", bundle(), "--greedy-steps", 1)),
    ]
