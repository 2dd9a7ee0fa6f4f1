"""Deployment compiler for Doge: a checkpoint in, a verified ONNX bundle out.

The names of `__all__` are those of `api.py`, which is imported when the first of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.2.0"

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
