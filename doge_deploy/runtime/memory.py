"""Whether a bundle fits into the memory that is left, said before it is loaded."""

from __future__ import annotations

import math
from pathlib import Path

from doge_deploy.bundle.manifest import Layout
from doge_deploy.bundle.opening import Bundle
from doge_deploy.devices.host import ROOT, available_memory
from doge_deploy.dtypes import DTYPES
from doge_deploy.errors import MissingDependencyError


def check_memory(bundle: Bundle, layout: Layout, root: Path = ROOT) -> None:
    """Compare the least that one row of a layout takes with what this process may still take.

    Args:
        bundle: an opened bundle.
        layout: which of its graphs is to be run.
        root: where /proc and /sys are, for tests.

    Raises:
        MissingDependencyError: it does not fit; the message has both numbers.
    """
    left, least = available_memory(root), least_bytes(bundle, layout)
    if left is not None and least > left:
        raise MissingDependencyError(
            f"{bundle.path} takes at least {least / 1e6:,.1f} MB of memory, this process has {left / 1e6:,.1f} MB "
            "left: free some, raise the limit of the container, or export with --quantize"
        )


def least_bytes(bundle: Bundle, layout: Layout) -> int:
    """Weights, twice where they are widened from bfloat16, and the cache of one row as far as its size is fixed.

    A lower bound: activations and what ONNX Runtime lays out anew come on top.
    """
    weights: int = sum(entry["bytes"] for name, entry in bundle.manifest.files.items() if name.endswith(".safetensors"))
    widened = 2 if bundle.manifest.dtype == "bfloat16" else 1
    cache: int = sum(
        DTYPES[spec.dtype].nbytes(math.prod(size for size in spec.shape if isinstance(size, int)))
        for spec in layout.signature.inputs
        if spec.name.startswith("past") and sum(isinstance(size, str) for size in spec.shape) == 1
    )
    return weights * widened + cache
