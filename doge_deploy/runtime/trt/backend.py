"""Engines of TensorRT and TensorRT-RTX as backends; the vendor's library is imported when an engine is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.options.build import Target
from doge_deploy.targets.backend import Backend, Library, SessionOptions
from doge_deploy.targets.trt.vendor import PRODUCTS

if TYPE_CHECKING:
    from doge_deploy.devices.facts import DeviceFacts
    from doge_deploy.runtime.trt.runner import TrtRunner
    from doge_deploy.targets.deployment import Constraints, DeployableModel, Held, Obstacle


class TrtBackend(Backend["TrtRunner"]):
    """One of the two products. An engine has the outputs that it was built with, so it shows no selections."""

    layouts = ("static",)
    session_options = frozenset({"engine"})
    needs_gpu = True
    builds = True

    def __init__(self, target: Target) -> None:
        product = PRODUCTS[target]
        self._product = product
        self.target = target
        self.name = target
        self.title = product.name
        self.libraries = (
            Library(
                product.module,
                product.extra,
                distributions=product.distributions,
                probe="module.Builder",  # the native part is there
                first_version=product.first_version,
                title=product.name,
                jetson_remedy=product.jetson_remedy,
            ),
            Library("cuda.core", product.extra, distributions=("cuda-core",), probe="module.Device"),
        )
        self.build_needs_gpu = product.needs_gpu

    def open(self, bundle: Bundle, layout: Layout, options: SessionOptions, *, graph: bytes | None = None) -> TrtRunner:
        from doge_deploy.runtime import trt

        return trt.open_runner(bundle, self.target, options.engine)

    def require(self, bundle: Bundle) -> None:
        from doge_deploy.runtime.trt.product import engines_for

        engines_for(bundle, self.target)

    def runs(self, layout: Layout, options: SessionOptions) -> str:
        return "an engine"

    def default_dtype(self, constraints: Constraints) -> str:
        return constraints.engine_dtype

    def lowering(self, device: DeviceFacts, constraints: Constraints) -> str:
        from doge_deploy.targets.trt.deployment import lowering

        return lowering(self._product, device, constraints)

    def device_obstacles(self, device: DeviceFacts, dtype: str) -> Iterator[Obstacle]:
        from doge_deploy.targets.trt.deployment import device_obstacles

        return device_obstacles(self._product, device, dtype)

    def gpu_obstacle(self, capabilities: Sequence[str]) -> Obstacle | None:
        from doge_deploy.targets.trt.deployment import gpu_obstacle

        return gpu_obstacle(self._product, capabilities)

    def model_obstacles(self, model: DeployableModel, dtype: str, lowering: str) -> Iterator[Obstacle]:
        from doge_deploy.targets.trt.deployment import model_obstacles

        return model_obstacles(self._product, model, dtype, lowering)

    def held(self, model: DeployableModel, lowering: str) -> Held:
        from doge_deploy.targets.trt.deployment import held

        return held(model, lowering)

    def build_bytes(self, fp16_weight_bytes: int) -> int | None:
        from doge_deploy.targets.trt.deployment import build_bytes

        return build_bytes(fp16_weight_bytes) if self.build_needs_gpu else None

    def import_libraries(self) -> None:
        import doge_deploy.runtime.trt  # noqa: F401


TRT = TrtBackend("trt")
TRT_RTX = TrtBackend("trt-rtx")
