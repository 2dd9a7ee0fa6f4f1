"""Sessions of ONNX Runtime, and which file of a bundle they run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from doge_deploy.bundle.manifest import Layout
from doge_deploy.devices.host import usable_threads
from doge_deploy.devices.versions import at_least
from doge_deploy.diagnostics import out_of_memory
from doge_deploy.errors import MissingDependencyError, UnsupportedModelError

if TYPE_CHECKING:
    import onnxruntime

SPIN_US = 50
"""How long an idle thread spins for the next operator before it sleeps, in microseconds.

ONNX Runtime's own default is a number of turns that take milliseconds: on a core that something else needs too, steps
then wait for each other's time slices. Without spinning a step of a small model takes up to 1.5 times as long. Figures
are in docs/benchmarks.md.
"""

_FLUSH = "session.set_denormal_as_zero"
_SAVED_WEIGHTS = "session.optimized_model_external_initializers_file_name"
_SMALLEST_SAVED = "session.optimized_model_external_initializers_min_size_in_bytes"
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def open_session(
    model: Path | bytes,
    folder: Path,
    *,
    threads: int | None = None,
    spin: int | None = None,
    flush_denormals: bool = False,
    profile: Path | None = None,
    optimised: bool = False,
    fold: bool = True,
    save_to: Path | None = None,
    leaves_interpreter: Callable[[], None] | None = None,
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU provider.

    Args:
        model: a file of the bundle, or a changed graph as bytes.
        folder: where the external data of a graph given as bytes lies.
        threads: intra-op threads, see `usable_threads`.
        spin: microseconds that idle threads spin for the next operator, 0 to let them sleep at once; `SPIN_US` where
            None.
        flush_denormals: let the session's threads take numbers below 1.2e-38 for zero. The fused attention turns every
            key that a token may not see into such a number, on which processors of Intel are slow. ONNX Runtime sets
            the calling thread too, for good, if this is the first session of the process.
        profile: record the time of every operator; `end_profiling` of the session writes a file of this name and more.
        optimised: the graph is what `save_to` wrote; it is taken as it is.
        fold: let ONNX Runtime compute once what depends on constants alone.
        save_to: where to write the graph as ONNX Runtime optimised it, with its weights in a file beside it.
        leaves_interpreter: called once the graph is read, where ONNX Runtime is about to initialise the session, most
            of the time, and leaves Python's interpreter to other threads.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed, or there is no memory for the graph.
        UnsupportedModelError: ONNX Runtime refuses the graph.
    """
    load_library()
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_threads(threads)
    spin = SPIN_US if spin is None else spin
    if spin:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin))
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if flush_denormals:
        options.add_session_config_entry(_FLUSH, "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not fold:
        options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
        options.add_session_config_entry(_SAVED_WEIGHTS, f"{save_to.stem}.weights")
        options.add_session_config_entry(_SMALLEST_SAVED, "1024")
    if isinstance(model, bytes):
        options.add_session_config_entry(_EXTERNAL_FOLDER, str(folder))
    source = model if isinstance(model, bytes) else str(model)
    further = {} if leaves_interpreter is None else {"disabled_optimizers": _NoOptimisers(leaves_interpreter)}
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], **further)
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        if out_of_memory(error):
            raise MissingDependencyError(f"there is no memory for the graph: {error}") from error
        raise UnsupportedModelError(f"ONNX Runtime {onnxruntime.__version__} refuses the graph: {error}") from error


class _NoOptimisers:
    """No names of optimisers to leave out. ONNX Runtime asks for them when it has read the graph.

    It holds the interpreter while it reads, and not while it initialises the session; between the two nothing else of
    the caller's runs. Were they asked for at another time, threads would only begin earlier or later.
    """

    def __init__(self, asked: Callable[[], None]) -> None:
        self._asked = asked

    def __iter__(self) -> Iterator[str]:
        self._asked()
        return iter(())


def load_library() -> None:
    """Raises MissingDependencyError where ONNX Runtime is not installed."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise MissingDependencyError("ONNX Runtime is not installed: pip install 'doge-deploy[cpu]'") from None


def graph_file(layout: Layout, *, portable: bool = False) -> str:
    """The file of a layout that ONNX Runtime runs here.

    The graph lowered for it, unless there is none, the standard one is asked for, or the installed ONNX Runtime is
    older than the lowered graph needs.
    """
    lowered = layout.lowered.get("ort")
    if portable or lowered is None or lowered.file is None:
        return layout.file
    if lowered.requires:
        installed = _installed()
        if installed is None or not at_least(installed, lowered.requires):
            return layout.file
    return lowered.file


def _installed() -> str | None:
    """Version of ONNX Runtime: what is loaded says it at once, else what is installed, which is one of two packages."""
    if loaded := sys.modules.get("onnxruntime"):
        version: str = loaded.__version__
        return version
    import importlib.metadata

    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
