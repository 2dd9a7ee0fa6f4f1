"""NVIDIA's own Python bindings of TensorRT on a machine without TensorRT.

The bindings are a package of their own; the library behind them is not on any package index. TensorRT-RTX's library has
the symbols that they need, so with it in TensorRT's place NVIDIA's Python code runs for real: builder, parser, network,
profiles, timing cache. It is a double of the library: it shows that we call the bindings as they want to be called, and
never what TensorRT makes of a network.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

STUB = "int initLibNvInferPlugins(void *logger, const char *namespace_) { return 1; }\n"


def missing() -> str:
    """What is missing here for it, if anything."""
    for name in ("tensorrt_bindings", "tensorrt_rtx_libs"):
        if importlib.util.find_spec(name) is None:
            return f"needs the package {name.replace('_', '-')}"
    if shutil.which("cc") is None:
        return "needs a C compiler, for a library of one function"
    return ""


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import tensorrt` work in processes that are started from now on."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None and spec.submodule_search_locations is not None
    rtx = Path(spec.submodule_search_locations[0])
    for name, pattern in (
        ("libnvinfer.so.11", "libtensorrt_rtx.so.*"),
        ("libnvonnxparser.so.11", "libtensorrt_onnxparser_rtx.so.*"),
    ):
        (folder / name).symlink_to(next(rtx.glob(pattern)))
    source = folder / "stub.c"
    source.write_text(STUB)
    stub = str(folder / "libnvinfer_plugin.so.11")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", stub, str(source)], check=True)
    package = folder / "python" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join([str(folder), str(rtx)]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
