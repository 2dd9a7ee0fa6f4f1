"""ONNX Runtime's CUDA provider as a backend; the library itself is imported when a bundle is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from doge_deploy.bundle.manifest import Layout, Lowered
from doge_deploy.bundle.opening import Bundle
from doge_deploy.targets.backend import Backend, Library, SessionOptions
from doge_deploy.targets.deployment import Constraints, Obstacle

if TYPE_CHECKING:
    from doge_deploy.devices.facts import DeviceFacts
    from doge_deploy.runtime.cuda.runner import CudaRunner

FIRST_CAPABILITY = "7.5"
"""Of the builds for CUDA 13."""


class CudaBackend(Backend["CudaRunner"]):
    """The provider on a GPU, or its lowering on the processor, which is how it is judged without one."""

    title = "ONNX Runtime's CUDA provider"
    layouts = ("static",)
    lowers = ("static",)
    lowers_when_asked = True
    runs_graphs = True
    shows_selections = True

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self.needs_gpu = device == "cuda"
        self.name = "cuda" if device == "cuda" else "cuda (on the CPU provider)"
        self.libraries = (
            Library(
                "onnxruntime",
                "gpu",
                distributions=("onnxruntime-gpu",),
                probe="found['providers'] = module.get_available_providers()",
                first_version="1.31",
                title="onnxruntime-gpu",
                shares_module=True,
            ),
        )

    def lower(self, directory: Path, layout: Layout) -> Lowered:
        from doge_deploy.targets.cuda.write import write_lowered

        return write_lowered(directory, layout)

    def open(
        self, bundle: Bundle, layout: Layout, options: SessionOptions, *, graph: bytes | None = None
    ) -> CudaRunner:
        from doge_deploy.runtime import cuda

        return cuda.open_runner(bundle, layout, device=self._device, model=graph)

    def on_processor(self) -> CudaBackend:
        return ON_PROCESSOR

    def runs(self, layout: Layout, options: SessionOptions) -> str:
        from doge_deploy.runtime.cuda.open import graph_file

        return graph_file(layout)

    def default_dtype(self, constraints: Constraints) -> str:
        return constraints.engine_dtype

    def lowering(self, device: DeviceFacts, constraints: Constraints) -> str:
        return "cuda"

    def device_obstacles(self, device: DeviceFacts, dtype: str) -> Iterator[Obstacle]:
        from doge_deploy.devices.versions import at_least

        capability = device.compute_capability or "0"
        if device.kind == "jetson":
            yield Obstacle("onnxruntime-gpu was not tried on a Jetson", "use trt or ort")
        if not at_least(capability, FIRST_CAPABILITY):
            yield _too_old(capability)
        if dtype == "bf16":
            yield Obstacle("this backend reads logits in fp32 or fp16", "export with --dtype fp16")

    def gpu_obstacle(self, capabilities: Sequence[str]) -> Obstacle | None:
        from doge_deploy.devices.versions import at_least

        fits = any(at_least(one, FIRST_CAPABILITY) for one in capabilities)
        return None if fits else _too_old(", ".join(capabilities))


def _too_old(capability: str) -> Obstacle:
    return Obstacle(f"onnxruntime-gpu needs compute capability {FIRST_CAPABILITY}; this is {capability}", "use ort")


BACKEND = CudaBackend()
ON_PROCESSOR = CudaBackend("cpu")
