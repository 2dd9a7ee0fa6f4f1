"""The table of commands: every row names what is missing and the remedy."""

from __future__ import annotations

import pytest
from pretend_machines import GIB, machine, orin_machine, rtx_machine

from doge_deploy.doctor.commands import CommandStatus, commands
from doge_deploy.doctor.machine import Gpu, Machine

RUN_RTX, RUN_TRT = "generate --backend trt-rtx", "generate --backend trt"


def row(of: Machine, name: str) -> CommandStatus:
    return next(status for status in commands(of) if status.name == name)


def test_without_gpu_a_bundle_is_exported_verified_and_run() -> None:
    usable = {status.name for status in commands(machine()) if status.usable}
    assert usable == {"export", "verify", "verify --recording", "generate --backend ort"}


def test_tensorrt_rtx_builds_without_a_gpu_and_runs_with_one() -> None:
    versions = {"tensorrt_rtx": "1.7", "cuda.core": "1.2"}
    assert row(machine(versions=versions), "build --target trt-rtx").usable
    assert row(machine(versions=versions), RUN_RTX).reason == "no NVIDIA driver"
    assert row(rtx_machine(), RUN_RTX).usable


def test_every_obstacle_has_a_remedy() -> None:
    for one in (machine(versions={"onnxruntime": "1.20"}), rtx_machine(gpus=()), orin_machine(), rtx_machine()):
        for status in commands(one):
            assert status.reason and bool(status.remedy) != status.usable


OBSTACLES: dict[str, tuple[Machine, str, str, str]] = {
    "no onnxruntime": (machine(versions={"onnxruntime": None}), "verify", "no onnxruntime", "doge-deploy[cpu]"),  # type: ignore[dict-item]
    "old onnxruntime": (machine(versions={"onnxruntime": "1.20"}), "verify", "older than 1.25", "--upgrade"),
    "no transformers": (machine(versions={"transformers": None}), "export", "no transformers", "doge-deploy[export]"),  # type: ignore[dict-item]
    "half-installed": (
        rtx_machine(broken={"tensorrt_rtx": "ImportError: libcudart"}),
        "build --target trt-rtx",
        "tensorrt_rtx 9.9 is installed but does not load: ImportError: libcudart",
        "--force-reinstall",
    ),
    "no cuda.core": (rtx_machine(versions={"tensorrt_rtx": "1.7"}), RUN_RTX, "no cuda.core", "doge-deploy[rtx]"),
    "GPU hidden": (rtx_machine(gpus=()), RUN_RTX, "driver 590.1, but nvidia-smi lists no GPU", "--gpus all"),
    "Hopper": (rtx_machine(gpus=(Gpu("H100", "9.0", 80 * GIB, None),)), RUN_RTX, "9.0 is none of 7.5", "use trt"),
    "Volta": (
        rtx_machine(versions={"tensorrt": "11.4"}, gpus=(Gpu("V100", "7.0", 16 * GIB, None),)),
        RUN_TRT,
        "7.0 is less than 7.5",
        "use ort",
    ),
    "JetPack 6": (orin_machine(), RUN_TRT, "TensorRT 10.3.0 is older than 10.15.1", "JetPack 7.2"),
    "old and half-installed": (
        orin_machine(broken={"tensorrt": "ImportError: libnvinfer"}),
        RUN_TRT,
        "TensorRT 9.9 is older than 10.15.1",
        "JetPack 7.2",
    ),
    "no triton": (machine(), "plugins", "no triton", "doge-deploy[plugins]"),
}


@pytest.mark.parametrize(("of", "name", "reason", "remedy"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_obstacle(of: Machine, name: str, reason: str, remedy: str) -> None:
    found = row(of, name)
    assert not found.usable and reason in found.reason and remedy in found.remedy


def test_a_jetson_whose_capability_is_not_told_is_not_refused() -> None:
    orin = orin_machine(versions={"tensorrt": "11.4.1", "cuda.core": "1.2"}, gpus=(Gpu("Orin", None, None, None),))
    assert row(orin, RUN_TRT).usable
