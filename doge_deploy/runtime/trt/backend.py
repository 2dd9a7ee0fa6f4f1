"""Engines of TensorRT and TensorRT-RTX as backends; the vendor's library is imported when an engine is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.options.build import Target
from doge_deploy.targets.backend import Backend, Library, SessionOptions
from doge_deploy.targets.trt.vendor import PRODUCTS

if TYPE_CHECKING:
    from doge_deploy.runtime.trt.runner import TrtRunner


class TrtBackend(Backend["TrtRunner"]):
    """One of the two products. An engine has the outputs that it was built with, so it shows no selections."""

    layouts = ("static",)
    session_options = frozenset({"engine"})

    def __init__(self, target: Target) -> None:
        product = PRODUCTS[target]
        self.target = target
        self.name = target
        self.title = product.name
        self.libraries = (Library("cuda.core", product.extra), Library(product.module, product.extra))

    def open(self, bundle: Bundle, layout: Layout, options: SessionOptions, *, graph: bytes | None = None) -> TrtRunner:
        from doge_deploy.runtime import trt

        return trt.open_runner(bundle, self.target, options.engine)

    def require(self, bundle: Bundle) -> None:
        from doge_deploy.runtime.trt.product import engines_for

        engines_for(bundle, self.target)

    def runs(self, layout: Layout, options: SessionOptions) -> str:
        return "an engine"

    def import_libraries(self) -> None:
        import doge_deploy.runtime.trt  # noqa: F401


TRT = TrtBackend("trt")
TRT_RTX = TrtBackend("trt-rtx")
