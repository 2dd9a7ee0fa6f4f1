"""The two products: how they are imported, what they are called, what each can do."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from doge_deploy.devices.tensorrt_limits import TRT_FIRST_NATIVE_LAYERS
from doge_deploy.errors import MissingDependencyError
from doge_deploy.options.build import Target


@dataclass(frozen=True)
class Product:
    """One of NVIDIA's two."""

    target: Target
    name: str
    module: str
    """What Python imports."""
    extra: str
    """Of our package."""
    needs_gpu: bool
    """To build. TensorRT measures kernels on the device; TensorRT-RTX compiles on the CPU."""
    has_plugins: bool
    default_profiles: Literal["shared", "separate"]
    """See docs/decisions/0016-one-profile-stores-the-weights-once.md."""
    distributions: tuple[str, ...]
    """Names under which the module is installed."""
    first_version: str = ""
    """The oldest that will do; empty for any that can be installed."""
    jetson_remedy: str = ""
    """How a newer one comes to a Jetson."""


ON_JETSON = "install JetPack 7.2 or later"


_RTX_NAMES = ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12")
_TRT_NAMES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")

PRODUCTS: Mapping[Target, Product] = {
    "trt-rtx": Product("trt-rtx", "TensorRT-RTX", "tensorrt_rtx", "rtx", False, False, "shared", _RTX_NAMES),
    "trt": Product(
        "trt", "TensorRT", "tensorrt", "trt", True, True, "separate", _TRT_NAMES, TRT_FIRST_NATIVE_LAYERS, ON_JETSON
    ),
}


def check_installed(target: Target) -> None:
    """Raises MissingDependencyError where the product's Python module is not there; does not load it."""
    if importlib.util.find_spec(PRODUCTS[target].module) is None:
        raise _missing(PRODUCTS[target])


def import_product(target: Target) -> ModuleType:
    """The product's Python module.

    Raises:
        MissingDependencyError: it is not installed, or cannot be loaded here; says what to install.
    """
    product = PRODUCTS[target]
    check_installed(target)
    try:
        return importlib.import_module(product.module)
    except (ImportError, OSError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise MissingDependencyError(
            f"{product.name} is installed, but cannot be loaded: {first}; install it anew: {_remedy(product)}"
        ) from error


def _missing(product: Product) -> MissingDependencyError:
    return MissingDependencyError(
        f"--target {product.target} needs {product.name}, which is not installed: {_remedy(product)}"
    )


def _remedy(product: Product) -> str:
    elsewhere = " (on a Jetson it comes with JetPack)" if product.target == "trt" else ""
    return f"pip install 'doge-deploy[{product.extra}]'{elsewhere}"


def require_gpu(target: Target) -> None:
    """Raises MissingDependencyError where the product needs a GPU to build and there is none that it can use."""
    if not PRODUCTS[target].needs_gpu:
        return
    if _cuda_driver() is None:
        raise MissingDependencyError(
            f"--target {target} builds on the GPU that the engine is for, and no CUDA device was found; run it on that "
            "device with NVIDIA's driver installed, or build --target trt-rtx, which compiles on the CPU"
        )


def _cuda_driver() -> ctypes.CDLL | None:
    """NVIDIA's driver library, initialised, or None where there is none or no device."""
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    return driver


_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


def device_capability() -> str:
    """Compute capability of the first CUDA device.

    Raises:
        MissingDependencyError: there is none.
    """
    driver = _cuda_driver()
    if driver is None:
        raise MissingDependencyError("no CUDA device was found")
    parts = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        parts.append(str(value.value))
    return ".".join(parts)
