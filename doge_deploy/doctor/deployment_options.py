"""What a Doge can be run with on a device: backend, lowering and dtype, whether it fits, and the reason where not.

Everything follows from facts, so the device need not be here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from doge_deploy.bundle.signature import UNCACHED
from doge_deploy.devices.facts import GIB, DeviceFacts
from doge_deploy.devices.tensorrt_limits import (
    RTX_CAPABILITIES,
    TRT_FIRST_AOT_PLUGINS,
    TRT_FIRST_CAPABILITY,
    TRT_FIRST_NATIVE_LAYERS,
    supports_dtype,
)
from doge_deploy.devices.versions import at_least
from doge_deploy.doctor.fit import Needs, needs, weight_bytes
from doge_deploy.doctor.model import DeployableModel
from doge_deploy.dtypes import NAMES
from doge_deploy.graph.decode_traffic import decode_traffic
from doge_deploy.kernels.registry import installed
from doge_deploy.targets.trt.acceptance import refusals

BACKENDS = ("trt", "trt-rtx", "ort")

BUILD_BASE_BYTES = 1_500_000_000
BUILD_BYTES_PER_FP16_WEIGHT_BYTE = 6
"""A build may take the first plus the second times the weights in fp16; the engines of docs/ were held against it."""


@dataclass(frozen=True)
class DeploymentOption:
    """One backend on one device."""

    backend: str
    """`trt`, `trt-rtx` or `ort`, as `--backend` takes it."""
    lowering: str
    """`plugins` or `standard` for an engine, `cpu` for ONNX Runtime's CPU provider."""
    dtype: str
    reason: str = ""
    """Why it cannot be used; empty where it can."""
    remedy: str = ""
    needs: Needs | None = None
    """Memory while it runs; None where no model was named."""
    build_bytes: int | None = None
    """Memory of a build that must be made on the device itself."""
    tokens_per_second: float | None = None
    """What the memory's bandwidth allows at most: all rows together, their caches full. None where it is not known, or
    the model generates no tokens."""

    @property
    def usable(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Constraints:
    """What a file of export_configs/ or the command line asks for."""

    dtype: str | None = None
    """Of a bundle to be exported, whatever runs it; None for the backend's own."""
    engine_dtype: str = "fp16"
    """Of a bundle that an engine is built from: there are fused attention kernels for fp16 and bf16 only."""
    plugins: bool = True
    batch_size: int = 1


def deployment_options(
    device: DeviceFacts, model: DeployableModel | None = None, constraints: Constraints | None = None
) -> list[DeploymentOption]:
    """Every backend's answer for `device`, the ones that can be used first."""
    constraints = constraints or Constraints()
    found = [
        _deployment_option(backend, device, model, constraints)
        for backend in BACKENDS
        if backend == "ort" or device.kind != "cpu"
    ]
    return sorted(found, key=lambda option: not option.usable)


def _deployment_option(
    backend: str, device: DeviceFacts, model: DeployableModel | None, constraints: Constraints
) -> DeploymentOption:
    dtype, lowering = _dtype(backend, model, constraints), _lowering(backend, device, constraints)
    obstacle = next(_obstacles(backend, lowering, dtype, device, model), None)
    if model is None:
        return DeploymentOption(backend, lowering, dtype, *(obstacle or ()))
    need = needs(
        model.facts,
        dtype,
        batch_size=constraints.batch_size,
        max_length=model.max_length,
        last_logits=model.last_logits,
        weight_format=model.weight_format,
    )
    build = None
    if backend == "trt":
        build = BUILD_BASE_BYTES + BUILD_BYTES_PER_FP16_WEIGHT_BYTE * weight_bytes(model.facts, "fp16")
    speed = None
    # What is known of a graphics card's memory says nothing about the processor's.
    if backend != "ort" or device.memory_shared or device.kind == "cpu":
        obstacle = obstacle or _does_not_fit(device, need, build)
        if device.bandwidth_gb_per_s and UNCACHED not in model.layouts:
            rows = constraints.batch_size
            read = decode_traffic(
                model.facts,
                dtype=dtype,
                weight_format=model.weight_format,
                layout=model.layouts[0],
                max_length=model.max_length,
                batch_size=rows,
                keys=model.max_length,
            )
            speed = rows * device.bandwidth_gb_per_s * 1e9 / read.total_bytes
    return DeploymentOption(
        backend, lowering, dtype, *(obstacle or ("", "")), needs=need, build_bytes=build, tokens_per_second=speed
    )


def _dtype(backend: str, model: DeployableModel | None, constraints: Constraints) -> str:
    """The bundle's, or the one asked for; else what suits the backend: a CPU computes in fp32."""
    settled = model.dtype if model else None
    return settled or constraints.dtype or ("fp32" if backend == "ort" else constraints.engine_dtype)


def _lowering(backend: str, device: DeviceFacts, constraints: Constraints) -> str:
    if backend == "ort":
        return "cpu"
    aot = device.tensorrt is not None and at_least(device.tensorrt, TRT_FIRST_AOT_PLUGINS)
    return "plugins" if backend == "trt" and constraints.plugins and aot else "standard"


def _obstacles(
    backend: str, lowering: str, dtype: str, device: DeviceFacts, model: DeployableModel | None
) -> Iterator[tuple[str, str]]:
    """Reason and remedy of every obstacle, the most fundamental first."""
    if backend == "ort":
        return
    capability = device.compute_capability or "0"
    if backend == "trt-rtx":
        if capability not in RTX_CAPABILITIES:
            known = ", ".join(RTX_CAPABILITIES)
            yield f"TensorRT-RTX compiles for compute capability {known}; this is {capability}", "use trt or ort"
        if device.tensorrt_rtx is None:
            yield "no TensorRT-RTX", "pip install 'doge-deploy[rtx]'"
    else:
        yield from _tensorrt_obstacles(capability, device)
    if not supports_dtype(capability, dtype):
        yield f"compute capability {capability} has no {dtype}", "export with --dtype fp16"
    if model is None:
        return
    if UNCACHED in model.layouts:
        yield f"{model.name} has no cache, and engines are built for generating text", "use ort"
    elif "static" not in model.layouts:
        yield f"{model.name} has no static layout", "export it with --kv-cache static"
    # what `build` would say
    for refusal in refusals(
        model.facts,
        target=backend,
        dtype=NAMES[dtype],
        max_length=model.max_length,
        routing=model.routing,
        weight_format=model.weight_format,
        inlined=model.inlined,
        plugins=installed() if lowering == "plugins" else None,
    ):
        yield refusal.reason, refusal.remedy


def _tensorrt_obstacles(capability: str, device: DeviceFacts) -> Iterator[tuple[str, str]]:
    newer = "install JetPack 7.2 or later" if device.kind == "jetson" else "pip install 'doge-deploy[trt]'"
    if not at_least(capability, TRT_FIRST_CAPABILITY):
        yield f"TensorRT needs compute capability {TRT_FIRST_CAPABILITY}; this is {capability}", "use ort"
    if device.tensorrt is None:
        yield "no TensorRT", newer
    elif not at_least(device.tensorrt, TRT_FIRST_NATIVE_LAYERS):
        yield (
            f"TensorRT {device.tensorrt} lacks layers that every engine needs; {TRT_FIRST_NATIVE_LAYERS} brought them",
            newer,
        )


def _does_not_fit(device: DeviceFacts, need: Needs, build_bytes: int | None) -> tuple[str, str] | None:
    usable = device.usable_bytes
    if usable is None:
        return None
    if need.total_bytes > usable:
        return (
            f"needs {size(need.total_bytes)} of memory; {size(usable)} are free for it",
            "a smaller --max-length, --batch-size or dtype, or a larger device",
        )
    if build_bytes is not None and device.memory_shared and build_bytes > usable:
        return (
            f"fits, but its build may take {size(build_bytes)} of memory; {size(usable)} are free for it",
            f"build on a larger device of compute capability {device.compute_capability}",
        )
    return None


def size(count: int) -> str:
    """`1.25 GiB`, `340 MiB`, `1.2 MiB`"""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    mebibytes = count / (1 << 20)
    return f"{mebibytes:.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.1f} MiB"
