"""Deployment compiler for Doge: a checkpoint in, a verified ONNX bundle out.

The names of `__all__` are those of `api.py`, which is imported when the first of them is used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# ONNX Runtime's own builds from 1.29 on send events to Microsoft and keep a device id in the user's cache, unless this
# is set when the library is loaded (its Privacy.md). Nothing here calls another machine without being asked to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from doge_deploy.api import (
        BrokenBundleError,
        BuildOptions,
        DogeDeployError,
        ExportOptions,
        Generation,
        GenerationOptions,
        MismatchError,
        MissingDependencyError,
        Packed,
        TextChoices,
        TextModel,
        UnsupportedModelError,
        UsageError,
        bisect,
        build,
        export,
        load,
        localize,
        pack,
        record,
        unpack,
        verify,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module("doge_deploy.api"), name)
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "export",
    "build",
    "pack",
    "unpack",
    "verify",
    "record",
    "localize",
    "bisect",
    "load",
    "ExportOptions",
    "BuildOptions",
    "GenerationOptions",
    "TextChoices",
    "TextModel",
    "Generation",
    "Packed",
    "DogeDeployError",
    "MismatchError",
    "UsageError",
    "UnsupportedModelError",
    "BrokenBundleError",
    "MissingDependencyError",
]
