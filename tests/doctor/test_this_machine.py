"""What is read of a machine: from nvidia-smi and from /proc, as they are and as they may be."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from pretend_machines import GIB, machine, orin_machine, rtx_machine

from doge_deploy.doctor.machine import Gpu, this_machine

SMI = """#!/bin/sh
case "$1" in
  --version) {version};;
  --query-gpu=*) {query};;
esac
"""

VERSION = r"""printf 'NVIDIA-SMI version  : 590.10\nDRIVER version      : 590.10\nCUDA Version        : 13.2\n'"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an nvidia-smi that answers as told first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(query: str, version: str = VERSION) -> None:
        path = folder / "nvidia-smi"
        path.write_text(SMI.format(query=query, version=version), encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The /proc of a machine with 8 GB, half of them free."""
    path = tmp_path / "root"
    (path / "proc").mkdir(parents=True)
    (path / "proc/meminfo").write_text("MemTotal:  8388608 kB\nMemFree:  1 kB\nMemAvailable:  4194304 kB\n")
    (path / "proc/cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 3 GHz\n")
    return path


def test_a_desktop(smi: Callable[..., None], root: Path) -> None:
    smi("printf 'NVIDIA GeForce RTX 4090, 8.9, 24564, 23000\\nNVIDIA A2, 8.6, 15356, 15000\\n'")
    found = this_machine(root)
    assert (found.driver, found.cuda, found.board) == ("590.10", "13.2", None)
    assert found.gpus[0] == Gpu("NVIDIA GeForce RTX 4090", "8.9", 24564 << 20, 23000 << 20)
    assert [gpu.compute_capability for gpu in found.gpus] == ["8.9", "8.6"]
    assert (found.processor, found.memory_bytes, found.free_bytes) == ("Some CPU @ 3 GHz", 8 * GIB, 4 * GIB)


def test_a_jetson(smi: Callable[..., None], root: Path) -> None:
    smi("printf 'Orin (nvgpu), [N/A], [N/A], [N/A]\\n'")
    (root / "etc").mkdir()
    (root / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    (root / "proc/device-tree").mkdir()
    (root / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    found = this_machine(root)
    assert found.board == "NVIDIA Jetson Orin Nano Developer Kit, Jetson Linux 36.4.3"
    assert found.gpus == (Gpu("Orin (nvgpu)", None, None, None),)


@pytest.mark.parametrize("query", ["exit 9", "echo 'No devices were found'", "true", "printf '\\377\\376\\n'"])
def test_an_nvidia_smi_that_does_not_work(query: str, smi: Callable[..., None], root: Path) -> None:
    smi(query, version="exit 9")
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.1.2  x\n"
    )
    found = this_machine(root)
    assert found.gpus == () and found.driver == "570.1.2"


def test_a_machine_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = this_machine(tmp_path)
    assert (found.memory_bytes, found.driver, found.gpus) == (None, None, ())
    assert found.device().usable_bytes is None


def test_as_a_device_a_machine_is_its_first_gpu() -> None:
    facts = rtx_machine().device()
    assert (facts.kind, facts.compute_capability, facts.tensorrt_rtx) == ("desktop", "8.9", "1.7.1.116")
    assert facts.usable_bytes == 22 * GIB and facts.tensorrt is None


def test_as_a_device_a_jetson_has_the_memory_of_the_system() -> None:
    facts = orin_machine().device()
    assert facts.memory_shared and facts.usable_bytes == 12 * GIB and facts.tensorrt == "10.3.0"


def test_as_a_device_a_machine_without_gpu_is_its_processor() -> None:
    facts = machine().device()
    assert (facts.kind, facts.usable_bytes) == ("cpu", 12 * GIB)


def test_a_library_that_does_not_load_is_none() -> None:
    assert rtx_machine(broken={"tensorrt_rtx": "it does not"}).device().tensorrt_rtx is None
