"""Which library runs a bundle: ONNX Runtime, or an engine of TensorRT or TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Sequence

from doge_deploy.bundle.manifest import Bundle
from doge_deploy.errors import UsageError
from doge_deploy.options.backends import Backend
from doge_deploy.runtime.base import BundleRunner


def open_backend(
    bundle: Bundle,
    backend: Backend = "ort",
    *,
    layout: str | None = None,
    portable: bool = False,
    threads: int | None = None,
    flush_denormals: bool = False,
    engine: str | None = None,
) -> BundleRunner:
    """A runner of a bundle; the backend's library is loaded here and not before.

    Args:
        bundle: an opened bundle.
        backend: `ort`, `trt` or `trt-rtx`.
        layout, portable, threads, flush_denormals: of ONNX Runtime, see `runtime/ort/open.py`.
        engine: the name of an engine, where several fit.

    Raises:
        UsageError: an option of one backend was given for another, or there is no such layout or engine.
        MissingDependencyError: the library, the driver or the GPU is missing.
        BrokenBundleError, UnsupportedModelError: the library refuses the graph or the engine.
    """
    if backend == "ort":
        if engine is not None:
            raise UsageError(f"--engine {engine} belongs to an engine: give --backend trt or trt-rtx too")
        from doge_deploy.runtime.ort import open_runner

        return open_runner(bundle, layout, threads=threads, flush_denormals=flush_denormals, portable=portable)
    for option, given in (("--portable", portable), ("--threads", threads is not None)):
        if given:
            raise UsageError(f"{option} belongs to --backend ort; {backend} runs an engine")
    check_engine_layout([] if layout is None else [layout])
    from doge_deploy.runtime.trt import open_runner as open_engine

    return open_engine(bundle, backend, engine)


def check_engine_layout(layouts: Sequence[str]) -> None:
    """Raises UsageError where a layout is asked for that no engine is built from."""
    if wrong := [layout for layout in layouts if layout != "static"]:
        raise UsageError(f"--layout {wrong[0]} belongs to --backend ort; engines are built from the static layout")
