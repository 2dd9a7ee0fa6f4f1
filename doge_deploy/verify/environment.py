"""What a verification was made with: versions, system and processor."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

from doge_deploy import __version__
from doge_deploy.devices.host import available_cpus, processor_name

PACKAGES = ("onnxruntime", "torch", "transformers", "onnx", "numpy", "tensorrt-rtx-cu13", "tensorrt", "triton")
"""Whose version may change a number, as the package index calls them."""


@dataclass(frozen=True)
class Environment:
    """Where and with what."""

    doge_deploy: str
    """Version of this package."""
    python: str
    system: str
    processor: str
    cpus: int
    """That this process may use."""
    packages: dict[str, str]
    """Version of each of `PACKAGES` that is installed."""


def this_environment() -> Environment:
    """Of this process; no package is imported for it."""
    return Environment(
        doge_deploy=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=processor_name(),
        cpus=available_cpus(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
