"""What this machine can do: one row per step and target, with the reason and the remedy where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from doge_deploy.devices.tensorrt_limits import (
    RTX_CAPABILITIES,
    TRT_FIRST_CAPABILITY,
    TRT_FIRST_NATIVE_LAYERS,
)
from doge_deploy.devices.versions import at_least
from doge_deploy.doctor.machine import Machine

ORT_FIRST = "1.25"
"""The first ONNX Runtime with TensorScatter; see pyproject.toml."""


@dataclass(frozen=True)
class Target:
    """A command, or a part of one, and whether it works here."""

    name: str
    usable: bool
    reason: str
    """What it works with, or why it does not."""
    remedy: str = ""


@dataclass(frozen=True)
class _Obstacle:
    reason: str
    remedy: str


def targets(machine: Machine) -> list[Target]:
    """All rows."""
    export = _packages(machine, ("torch", "transformers", "onnxscript"), "export")
    ort = _ort(machine)
    rtx, trt = _library(machine, "tensorrt_rtx", "rtx"), _tensorrt(machine)
    rtx_gpu, trt_gpu = _gpu(machine, RTX_CAPABILITIES), _gpu(machine, None)
    return [
        _row(machine, "export", ("torch", "transformers"), [export]),
        _row(machine, "verify", ("torch", "transformers", "onnxruntime"), [export, ort]),
        _row(machine, "generate --backend ort", ("onnxruntime",), [ort]),
        _row(machine, "build --target trt-rtx", ("tensorrt_rtx",), [rtx]),
        _row(machine, "generate --backend trt-rtx", ("tensorrt_rtx",), [rtx, rtx_gpu, _cuda(machine, "rtx")]),
        _row(machine, "build --target trt", ("tensorrt",), [trt, trt_gpu]),
        _row(machine, "generate --backend trt", ("tensorrt",), [trt, trt_gpu, _cuda(machine, "trt")]),
        _row(machine, "plugins", ("triton",), [_library(machine, "triton", "plugins")]),
    ]


def _row(machine: Machine, name: str, uses: tuple[str, ...], obstacles: list[_Obstacle | None]) -> Target:
    found = [obstacle for obstacle in obstacles if obstacle is not None]
    if not found:
        return Target(name, True, ", ".join(f"{library} {machine.libraries[library].version}" for library in uses))
    return Target(
        name,
        False,
        "; ".join(obstacle.reason for obstacle in found),
        "; ".join(dict.fromkeys(obstacle.remedy for obstacle in found)),
    )


def _packages(machine: Machine, names: tuple[str, ...], extra: str) -> _Obstacle | None:
    missing = [name for name in names if machine.libraries[name].version is None]
    return _Obstacle(f"no {', '.join(missing)}", _install(extra)) if missing else None


def _library(machine: Machine, name: str, extra: str) -> _Obstacle | None:
    found = machine.libraries[name]
    if found.version is None:
        return _Obstacle(f"no {name}", _install(extra))
    if found.problem:
        return _Obstacle(
            f"{name} {found.version} is installed but does not load: {found.problem}",
            f"install it again: {_install(extra)} --force-reinstall",
        )
    return None


def _ort(machine: Machine) -> _Obstacle | None:
    version = machine.libraries["onnxruntime"].version
    if version is not None and version != "unknown" and not at_least(version, ORT_FIRST):
        return _Obstacle(f"onnxruntime {version} is older than {ORT_FIRST}", _install("cpu") + " --upgrade")
    return _library(machine, "onnxruntime", "cpu")


def _tensorrt(machine: Machine) -> _Obstacle | None:
    found = machine.libraries["tensorrt"]
    if found.works and found.version and not at_least(found.version, TRT_FIRST_NATIVE_LAYERS):
        remedy = "install JetPack 7.2 or later" if machine.board else _install("trt") + " --upgrade"
        return _Obstacle(f"TensorRT {found.version} is older than {TRT_FIRST_NATIVE_LAYERS}", remedy)
    return _library(machine, "tensorrt", "trt")


def _gpu(machine: Machine, capabilities: tuple[str, ...] | None) -> _Obstacle | None:
    """A GPU of one of these compute capabilities, or of any that TensorRT takes."""
    if machine.driver is None and not machine.gpus:
        return _Obstacle("no NVIDIA driver", "a machine with an NVIDIA GPU and its driver")
    if not machine.gpus:
        return _Obstacle(
            f"driver {machine.driver}, but nvidia-smi lists no GPU",
            "see what `nvidia-smi` says; in a container, --gpus all",
        )
    known = [gpu.compute_capability for gpu in machine.gpus if gpu.compute_capability]
    if not known:
        return None  # nvidia-smi does not tell it on a Jetson; the library will
    if capabilities is not None and not set(known) & set(capabilities):
        return _Obstacle(
            f"compute capability {', '.join(known)} is none of {', '.join(capabilities)}", "use trt or ort"
        )
    if capabilities is None and not any(at_least(one, TRT_FIRST_CAPABILITY) for one in known):
        return _Obstacle(f"compute capability {', '.join(known)} is less than {TRT_FIRST_CAPABILITY}", "use ort")
    return None


def _cuda(machine: Machine, extra: str) -> _Obstacle | None:
    return _library(machine, "cuda.core", extra)


def _install(extra: str) -> str:
    return f"pip install 'doge-deploy[{extra}]'"
