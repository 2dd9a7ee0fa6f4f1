"""What NVIDIA's two products ask of a device and of a model, from facts alone; `doctor` tells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from doge_deploy.bundle.signature import UNCACHED
from doge_deploy.devices.facts import DeviceFacts
from doge_deploy.devices.tensorrt_limits import (
    RTX_CAPABILITIES,
    TRT_FIRST_AOT_PLUGINS,
    TRT_FIRST_CAPABILITY,
    TRT_FIRST_NATIVE_LAYERS,
    supports_dtype,
)
from doge_deploy.devices.versions import at_least
from doge_deploy.dtypes import NAMES
from doge_deploy.kernels.registry import installed
from doge_deploy.targets.deployment import Constraints, DeployableModel, Held, Obstacle
from doge_deploy.targets.trt.acceptance import refusals
from doge_deploy.targets.trt.bounded.choices import longest_call, window_of
from doge_deploy.targets.trt.vendor import ON_JETSON, Product

PLUGINS, STANDARD = "plugins", "standard"

BUILD_BASE_BYTES = 1_500_000_000
BUILD_BYTES_PER_FP16_WEIGHT_BYTE = 6
"""A build of TensorRT may take the first plus the second times the weights in fp16; the engines of docs/ took less."""


def build_bytes(fp16_weight_bytes: int) -> int:
    """Memory that a build takes at most, of a model whose weights take so many bytes in fp16."""
    return BUILD_BASE_BYTES + BUILD_BYTES_PER_FP16_WEIGHT_BYTE * fp16_weight_bytes


def held(model: DeployableModel, lowering: str) -> Held:
    """What an engine holds; one whose cache holds the window is two networks, and its prefill gives another cache."""
    window = 0 if lowering == PLUGINS else window_of(model.facts, model.max_length, inlined=model.inlined)
    if not window:
        return Held(slots=model.max_length, longest_call=model.max_length)
    whole = (model.facts.is_moe and model.routing == "reference") or model.facts.rope_changes(model.max_length)
    longest = longest_call(model.max_length, whole=whole)
    return Held(slots=window, longest_call=longest, score_numbers=2, networks=2, caches=2, keys=window + longest)


def lowering(product: Product, device: DeviceFacts, constraints: Constraints) -> str:
    """With the plugins where they are wanted and the product takes those that are compiled ahead of time."""
    aot = device.tensorrt is not None and at_least(device.tensorrt, TRT_FIRST_AOT_PLUGINS)
    return PLUGINS if product.has_plugins and constraints.plugins and aot else STANDARD


def gpu_obstacle(product: Product, capabilities: Sequence[str]) -> Obstacle | None:
    """Why none of a machine's GPUs, of which the compute capabilities are given, runs an engine."""
    found = f"compute capability {', '.join(capabilities)}"
    if product.target == "trt-rtx":
        if not set(capabilities) & set(RTX_CAPABILITIES):
            return Obstacle(f"{found} is none of {', '.join(RTX_CAPABILITIES)}", "use trt or ort")
    elif not any(at_least(one, TRT_FIRST_CAPABILITY) for one in capabilities):
        return Obstacle(f"{found} is less than {TRT_FIRST_CAPABILITY}", "use ort")
    return None


def device_obstacles(product: Product, device: DeviceFacts, dtype: str) -> Iterator[Obstacle]:
    """Why a device has no engines of `dtype`."""
    capability = device.compute_capability or "0"
    yield from (_rtx_obstacles if product.target == "trt-rtx" else _tensorrt_obstacles)(capability, device)
    if not supports_dtype(capability, dtype):
        yield Obstacle(f"compute capability {capability} has no {dtype}", "export with --dtype fp16")


def _rtx_obstacles(capability: str, device: DeviceFacts) -> Iterator[Obstacle]:
    if capability not in RTX_CAPABILITIES:
        known = ", ".join(RTX_CAPABILITIES)
        yield Obstacle(f"TensorRT-RTX compiles for compute capability {known}; this is {capability}", "use trt or ort")
    if device.tensorrt_rtx is None:
        yield Obstacle("no TensorRT-RTX", "pip install 'doge-deploy[rtx]'")


def _tensorrt_obstacles(capability: str, device: DeviceFacts) -> Iterator[Obstacle]:
    newer = ON_JETSON if device.kind == "jetson" else "pip install 'doge-deploy[trt]'"
    if not at_least(capability, TRT_FIRST_CAPABILITY):
        yield Obstacle(f"TensorRT needs compute capability {TRT_FIRST_CAPABILITY}; this is {capability}", "use ort")
    if device.tensorrt is None:
        yield Obstacle("no TensorRT", newer)
    elif not at_least(device.tensorrt, TRT_FIRST_NATIVE_LAYERS):
        yield Obstacle(
            f"TensorRT {device.tensorrt} lacks layers that every engine needs; {TRT_FIRST_NATIVE_LAYERS} brought them",
            newer,
        )


def model_obstacles(product: Product, model: DeployableModel, dtype: str, lowering: str) -> Iterator[Obstacle]:
    """Why no engine of a model can be built, whatever the device: what `build` would say."""
    if UNCACHED in model.layouts:
        yield Obstacle(f"{model.name} has no cache, and engines are built for generating text", "use ort")
    elif "static" not in model.layouts:
        yield Obstacle(f"{model.name} has no static layout", "export it with --kv-cache static")
    for refusal in refusals(
        model.facts,
        target=product.target,
        dtype=NAMES[dtype],
        max_length=model.max_length,
        routing=model.routing,
        weight_format=model.weight_format,
        inlined=model.inlined,
        plugins=installed() if lowering == PLUGINS else None,
    ):
        yield Obstacle(refusal.reason, refusal.remedy)
