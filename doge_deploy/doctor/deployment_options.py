"""What a Doge can be run with on a device: backend, lowering and dtype, whether it fits, and the reason where not.

Everything follows from facts, so the device need not be here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from doge_deploy.bundle.signature import UNCACHED
from doge_deploy.devices.facts import GIB, DeviceFacts
from doge_deploy.devices.versions import at_least
from doge_deploy.doctor.fit import Needs, needs, weight_bytes
from doge_deploy.graph.decode_traffic import decode_traffic
from doge_deploy.targets.backend import Backend, loadable
from doge_deploy.targets.deployment import Constraints, DeployableModel, Obstacle


@dataclass(frozen=True)
class DeploymentOption:
    """One backend on one device."""

    backend: str
    """As `--backend` takes it."""
    lowering: str
    """What of a bundle is run, in the backend's word: `plugins` or `standard` for an engine, `cpu`."""
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


def deployment_options(
    device: DeviceFacts, model: DeployableModel | None = None, constraints: Constraints | None = None
) -> list[DeploymentOption]:
    """Every backend's answer for `device`, the ones that can be used first, those that take a GPU before the others."""
    constraints = constraints or Constraints()
    found = [
        _deployment_option(backend, device, model, constraints)
        for backend in sorted(loadable(), key=lambda one: not one.needs_gpu)
        if device.kind != "cpu" or not backend.needs_gpu
    ]
    return sorted(found, key=lambda option: not option.usable)


def _deployment_option(
    backend: Backend[Any], device: DeviceFacts, model: DeployableModel | None, constraints: Constraints
) -> DeploymentOption:
    # The bundle's, or the one asked for; else what suits the backend.
    dtype = (model.dtype if model else None) or constraints.dtype or backend.default_dtype(constraints)
    lowering = backend.lowering(device, constraints)
    obstacle = next(_obstacles(backend, lowering, dtype, device, model), None)
    if model is None:
        return _option(backend, lowering, dtype, obstacle)
    need = needs(
        model.facts,
        dtype,
        batch_size=constraints.batch_size,
        max_length=model.max_length,
        last_logits=model.last_logits,
        weight_format=model.weight_format,
        held=backend.held(model, lowering),
    )
    build = backend.build_bytes(weight_bytes(model.facts, "fp16"))
    speed = None
    # What is known of a graphics card's memory says nothing about the processor's.
    if backend.needs_gpu or device.memory_shared or device.kind == "cpu":
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
    return _option(backend, lowering, dtype, obstacle, needs=need, build_bytes=build, tokens_per_second=speed)


def _option(
    backend: Backend[Any], lowering: str, dtype: str, obstacle: Obstacle | None, **memory: Any
) -> DeploymentOption:
    reason, remedy = (obstacle.reason, obstacle.remedy) if obstacle else ("", "")
    return DeploymentOption(backend.name, lowering, dtype, reason, remedy, **memory)


def _obstacles(
    backend: Backend[Any], lowering: str, dtype: str, device: DeviceFacts, model: DeployableModel | None
) -> Iterator[Obstacle]:
    """Every obstacle but the memory, the most fundamental first."""
    yield from backend.device_obstacles(device, dtype)
    if model is not None:
        first = "" if model.weight_format is None else model.weight_format.first_capability
        capability = device.compute_capability
        if backend.builds and first and capability is not None and not at_least(capability, first):
            assert model.weight_format is not None
            yield Obstacle(
                f"engines of {model.weight_format.name} weights need compute capability {first}; this is {capability}",
                "export with --quantize int4 --dtype fp16",
            )
        yield from backend.model_obstacles(model, dtype, lowering)


def _does_not_fit(device: DeviceFacts, need: Needs, build_bytes: int | None) -> Obstacle | None:
    usable = device.usable_bytes
    if usable is None:
        return None
    if need.total_bytes > usable:
        return Obstacle(
            f"needs {size(need.total_bytes)} of memory; {size(usable)} are free for it",
            "a smaller --max-length, --batch-size or dtype, or a larger device",
        )
    if build_bytes is not None and device.memory_shared and build_bytes > usable:
        return Obstacle(
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
