"""This machine: processor, memory, GPUs, driver, and the libraries of `probe.py`."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from doge_deploy.devices.facts import GIB, DeviceFacts, EnginePlatform
from doge_deploy.devices.host import (
    ROOT,
    available_cpus,
    available_memory,
    kilobytes_field,
    platform_name,
    processor_name,
    read_text,
)
from doge_deploy.doctor.probe import Found, libraries, probe_libraries, run_tool
from doge_deploy.options.build import parse_capability


@dataclass(frozen=True)
class Gpu:
    """A CUDA device; None is what could not be found out."""

    name: str
    compute_capability: str | None
    memory_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True)
class Machine:
    """Where this runs."""

    system: str
    python: str
    processor: str
    cpus: int
    memory_bytes: int | None
    free_bytes: int | None
    """Of memory: what could be taken now without swapping."""
    board: str | None
    """Of a Jetson: the board's name and its Jetson Linux release."""
    driver: str | None
    cuda: str | None
    """The newest CUDA that the driver serves."""
    gpus: tuple[Gpu, ...]
    libraries: Mapping[str, Found]

    def device(self) -> DeviceFacts:
        """This machine in the form of a file of export_configs/: its first GPU, or its processor."""
        gpu = next((gpu for gpu in self.gpus if gpu.compute_capability), None)
        shared = self.board is not None
        total, free = self.memory_bytes, self.free_bytes
        if gpu is not None and not shared:
            total, free = gpu.memory_bytes, gpu.free_bytes
        facts: dict[str, Any] = {
            "platform": platform_name() if platform_name() in get_args(EnginePlatform) else "any",
            "product": gpu.name if gpu else self.processor,
            "memory_gib": total / GIB if total else None,
            "memory_reserved_gib": (total - free) / GIB if total and free is not None else 0.0,
        }
        if gpu is None:
            return DeviceFacts(kind="cpu", **facts)
        return DeviceFacts(
            kind="jetson" if shared else "desktop",
            compute_capability=gpu.compute_capability,
            memory_shared=shared,
            cuda=self.cuda,
            tensorrt=self._version("tensorrt"),
            tensorrt_rtx=self._version("tensorrt_rtx"),
            **facts,
        )

    def _version(self, library: str) -> str | None:
        found = self.libraries[library]
        return found.version if found.works else None


def this_machine(root: Path = ROOT) -> Machine:
    """Look at everything. `root` is where /proc and /etc are, for tests."""
    found = probe_libraries(libraries())
    driver, cuda = _driver(root)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=processor_name(root),
        cpus=available_cpus(root),
        memory_bytes=kilobytes_field(root / "proc/meminfo", "MemTotal"),
        free_bytes=available_memory(root),
        board=_jetson_board(root),
        driver=driver,
        cuda=cuda,
        gpus=_gpus(),
        libraries=found,
    )


def _gpus() -> tuple[Gpu, ...]:
    """What nvidia-smi lists. On a Jetson some of its fields are not there."""
    answer = run_tool(
        ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits"]
    )
    gpus = []
    for line in (answer or "").splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[0]:
            gpus.append(Gpu(fields[0], _capability(fields[1]), _mebibytes(fields[2]), _mebibytes(fields[3])))
    return tuple(gpus)


def _capability(text: str) -> str | None:
    try:
        return parse_capability(text)
    except ValueError:
        return None


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None


def _driver(root: Path) -> tuple[str | None, str | None]:
    """Versions of the kernel driver and of the newest CUDA that it serves."""
    answer = run_tool(["nvidia-smi", "--version"]) or ""
    driver = re.search(r"driver version\s*:\s*([\d.]+)", answer, re.IGNORECASE)
    cuda = re.search(r"cuda version\s*:\s*([\d.]+)", answer, re.IGNORECASE)
    if driver is None:
        text = read_text(root / "proc/driver/nvidia/version") or ""
        driver = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", text)
    return (driver[1] if driver else None, cuda[1] if cuda else None)


def _jetson_board(root: Path) -> str | None:
    release = read_text(root / "etc/nv_tegra_release")
    if release is None:
        return None
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", release)
    model = (read_text(root / "proc/device-tree/model") or "Jetson").strip("\0\n ")
    return f"{model}, Jetson Linux {found[1]}.{found[2]}" if found else model
