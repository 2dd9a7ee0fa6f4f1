"""A runner of a bundle on ONNX Runtime's CUDA provider, or a clear word why there is none."""

from __future__ import annotations

import importlib.metadata
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.devices.packages import require_graph_packages
from doge_deploy.devices.versions import at_least
from doge_deploy.errors import MissingDependencyError, UnsupportedModelError
from doge_deploy.runtime.cuda.memory import DeviceMemory
from doge_deploy.runtime.cuda.runner import CudaRunner
from doge_deploy.runtime.rows import ChangingAngles

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CUDAExecutionProvider"
PACKAGE, CPU_PACKAGE = "onnxruntime-gpu", "onnxruntime"
FIRST_VERSION = "1.31"
"""The one whose kernels were listed; older ones lack some for opset 24. See targets/cuda/kernels.json."""

INSTALL = f"pip uninstall {CPU_PACKAGE} {PACKAGE}, then pip install 'doge-deploy[gpu]'"
"""In this order: both packages are the module `onnxruntime`, and uninstalling one removes files of the other."""


def open_runner(
    bundle: Bundle, layout: Layout, *, device: str = "cuda", device_id: int = 0, model: bytes | None = None
) -> CudaRunner:
    """A runner of the static layout.

    Args:
        bundle: an opened bundle.
        layout: static. Where it was not lowered at export, the standard graph is lowered now.
        device: `cuda`; `cpu` runs the same on the CPU provider, for `verify --lowering-for` and for tests.
        device_id: which GPU.
        model: a changed graph to run instead, lowered or not.

    Raises:
        MissingDependencyError: the library, the provider in it, a driver or a GPU is missing, or the packages that
            lower a graph, where that must be done.
        UnsupportedModelError: the graph cannot be lowered, or ONNX Runtime refuses it.
    """
    ort = _import(device)
    manifest = bundle.manifest
    opened = partial(_open_session, ort, bundle.path, device, device_id)
    memory = DeviceMemory(device, device_id, partial(opened, optimise=False))
    _check_device(ort, memory)
    session = opened(_graph(bundle, layout, model))
    return CudaRunner(
        session,
        layout,
        memory,
        max_length=manifest.max_length,
        last=manifest.last_logits,
        whole_calls=bool(manifest.whole_calls),
        angles=ChangingAngles.in_bundle(manifest),
    )


def graph_file(layout: Layout) -> str:
    """The file of a layout that is run: the lowered one, or the standard one, which is lowered when it is opened."""
    lowered = layout.lowered.get("cuda")
    return layout.file if lowered is None or lowered.file is None else lowered.file


def _graph(bundle: Bundle, layout: Layout, model: bytes | None) -> bytes:
    file = graph_file(layout)
    if model is None and file != layout.file:
        return Path(bundle.path, file).read_bytes()
    require_graph_packages("lowering a graph for the CUDA provider")
    from doge_deploy.targets.cuda.lowering import lower_bytes

    return lower_bytes(Path(bundle.path, file).read_bytes() if model is None else model, bundle.path)


def _import(device: str) -> ModuleType:
    """ONNX Runtime, of a version and a package that has what is needed."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(f"ONNX Runtime with CUDA is not installed: {INSTALL}") from None
    onnxruntime.set_default_logger_severity(4)
    if device != "cuda":
        return onnxruntime  # type: ignore[no-any-return]
    version = onnxruntime.__version__
    if PROVIDER not in onnxruntime.get_available_providers():
        both = _is_installed(PACKAGE) and _is_installed(CPU_PACKAGE)
        reason = f"{CPU_PACKAGE} is installed over {PACKAGE}" if both else f"it is not {PACKAGE}"
        raise MissingDependencyError(
            f"ONNX Runtime {version} has no CUDA provider, because {reason}: on a machine with an NVIDIA GPU, {INSTALL}"
        )
    if not at_least(version, FIRST_VERSION):
        raise MissingDependencyError(f"{PACKAGE} {version} is older than {FIRST_VERSION}: {INSTALL}")
    return onnxruntime  # type: ignore[no-any-return]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_device(ort: ModuleType, memory: DeviceMemory) -> None:
    """Raises MissingDependencyError where nothing can be put into a GPU's memory."""
    try:
        memory.array((1,), "int64")
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise MissingDependencyError(
            f"{PACKAGE} {ort.__version__} finds no NVIDIA GPU that it can use; doge-deploy doctor says what is there"
        ) from error


def _open_session(
    ort: ModuleType, folder: Path, device: str, device_id: int, model: bytes, *, optimise: bool = True
) -> onnxruntime.InferenceSession:
    """A session on the device, with the processor for arithmetic of shapes.

    TF32 is switched off: it has 10 bits of a float32's 23.
    """
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, (PROVIDER, {"device_id": str(device_id), "use_tf32": "0"}))
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise UnsupportedModelError(f"ONNX Runtime {ort.__version__} refuses the graph: {error}") from error
    if device == "cuda" and PROVIDER not in session.get_providers():
        raise MissingDependencyError(
            f"the CUDA provider of {PACKAGE} {ort.__version__} does not start: it needs CUDA 13 and an NVIDIA GPU "
            "(doge-deploy doctor says what is there)"
        )
    return session
