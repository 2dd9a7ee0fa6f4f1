"""ONNX Runtime as a backend; the library itself is imported when a bundle is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from doge_deploy.bundle.manifest import Layout, Lowered
from doge_deploy.bundle.opening import Bundle
from doge_deploy.bundle.signature import LAYOUTS, UNCACHED
from doge_deploy.targets.backend import Backend, Library, SessionOptions

if TYPE_CHECKING:
    from doge_deploy.devices.facts import DeviceFacts
    from doge_deploy.runtime.ort.runners import OrtRunner
    from doge_deploy.targets.deployment import Constraints

FIRST_VERSION = "1.25"
"""The first ONNX Runtime with TensorScatter; see pyproject.toml."""


class OrtBackend(Backend["OrtRunner"]):
    """Its CPU provider."""

    name = "ort"
    title = "ONNX Runtime"
    libraries = (
        Library(
            "onnxruntime",
            "cpu",
            distributions=("onnxruntime", "onnxruntime-gpu"),
            probe="found['providers'] = module.get_available_providers()",
            first_version=FIRST_VERSION,
        ),
    )
    layouts = (*LAYOUTS, UNCACHED)
    lowers = LAYOUTS
    session_options = frozenset({"portable", "threads", "spin"})
    runs_graphs = True
    proves_bundles = True
    shows_selections = True

    def lower(self, directory: Path, layout: Layout) -> Lowered:
        from doge_deploy.targets.ort.write import write_lowered

        return write_lowered(directory, layout)

    def open(self, bundle: Bundle, layout: Layout, options: SessionOptions, *, graph: bytes | None = None) -> OrtRunner:
        from doge_deploy.runtime import ort

        return ort.open_runner(
            bundle,
            layout.signature.layout,
            threads=options.threads,
            spin=options.spin,
            flush_denormals=options.flush_denormals,
            portable=options.portable,
            model=graph,
            cache=options.graph_cache,
            leaves_interpreter=options.leaves_interpreter,
        )

    def runs(self, layout: Layout, options: SessionOptions) -> str:
        from doge_deploy.runtime.ort.session import graph_file

        return graph_file(layout, portable=options.portable)

    def lowering(self, device: DeviceFacts, constraints: Constraints) -> str:
        return "cpu"

    def import_libraries(self) -> None:
        super().import_libraries()
        import doge_deploy.runtime.ort  # noqa: F401


BACKEND = OrtBackend()
