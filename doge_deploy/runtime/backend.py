"""A runner of a bundle, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable

from doge_deploy.bundle.opening import Bundle
from doge_deploy.options.backends import DEFAULT_BACKEND
from doge_deploy.runtime.base import BundleRunner
from doge_deploy.targets.backend import SessionOptions, find


def open_backend(
    bundle: Bundle,
    backend: str = DEFAULT_BACKEND,
    *,
    layout: str | None = None,
    portable: bool = False,
    threads: int | None = None,
    spin: int | None = None,
    flush_denormals: bool = False,
    engine: str | None = None,
    graph_cache: bool = True,
    leaves_interpreter: Callable[[], None] | None = None,
) -> BundleRunner:
    """A runner of a bundle; the backend's library is loaded here and not before.

    Args:
        bundle: an opened bundle; where its files are still being checked, that ends before this returns or raises.
        backend: the name of an installed backend, such as `ort`, `trt` or `trt-rtx`.
        layout: the bundle's first that the backend runs, where None.
        portable, threads, spin, flush_denormals, engine, graph_cache, leaves_interpreter: see `SessionOptions`.

    Raises:
        UsageError: an option of one backend was given for another, or there is no such backend, layout or engine.
        MissingDependencyError: the backend cannot be loaded, or its library, driver or device is missing.
        BrokenBundleError: files of the bundle are missing or altered, which is said before all the rest.
        BrokenBundleError, UnsupportedModelError: the library refuses the graph or the engine.
    """
    with bundle.damage_first():
        found = find(backend)
        options = SessionOptions(portable, threads, engine, flush_denormals, spin, graph_cache, leaves_interpreter)
        found.check_options(options)
        chosen = found.choose_layout(bundle, layout)
        found.require(bundle)
        if not found.proves_bundles:
            bundle.prove()
        runner: BundleRunner = found.open(bundle, chosen, options)
    bundle.prove()
    return runner
