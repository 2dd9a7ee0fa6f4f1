"""Machines that are not here."""

from __future__ import annotations

from typing import Any

from doge_deploy.doctor.machine import Gpu, Machine
from doge_deploy.doctor.probe import Found, libraries

GIB = 1 << 30


def machine(*, versions: dict[str, str] | None = None, broken: dict[str, str] | None = None, **changes: Any) -> Machine:
    """A machine with everything for a CPU, and what is named."""
    installed = {"onnxruntime": "1.32.0", "torch": "2.13.0", "transformers": "5.23.0", "onnxscript": "0.7.2"}
    installed |= versions or {}
    found = {name: Found(installed.get(name)) for name in libraries()}
    found |= {name: Found("9.9", problem) for name, problem in (broken or {}).items()}
    values: dict[str, Any] = {
        "system": "Linux",
        "python": "3.11",
        "processor": "a processor",
        "cpus": 2,
        "memory_bytes": 16 * GIB,
        "free_bytes": 12 * GIB,
        "board": None,
        "driver": None,
        "cuda": None,
        "gpus": (),
        "libraries": found,
    }
    return Machine(**{**values, **changes})


def rtx_machine(**changes: Any) -> Machine:
    """A desktop with an RTX 4090 and TensorRT-RTX."""
    versions = {"tensorrt_rtx": "1.7.1.116", "cuda.core": "1.2.2"}
    gpu = Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 * GIB, 22 * GIB)
    return machine(**{"versions": versions, "driver": "590.1", "cuda": "13.2", "gpus": (gpu,), **changes})


def orin_machine(**changes: Any) -> Machine:
    """A Jetson AGX Orin with JetPack 6, where nvidia-smi does not tell the memory."""
    versions = {"tensorrt": "10.3.0", "cuda.core": "1.2.2"}
    gpu = Gpu("Orin (nvgpu)", "8.7", None, None)
    board = "NVIDIA Jetson AGX Orin Developer Kit, Jetson Linux 36.4.3"
    return machine(
        **{"versions": versions, "driver": "540.4.0", "cuda": "12.6", "gpus": (gpu,), "board": board, **changes}
    )
