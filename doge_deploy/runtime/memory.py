"""Whether a bundle fits into the memory that is left, said before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def check_slots(bundles: Sequence[Bundle], slots: int, root: Path = ROOT) -> None:
    """The same for bundles that are open at once, each with the memory of all its slots if it has any.

    Args:
        bundles: opened bundles.
        slots: rows of each.
        root: as in `check_memory`.

    Raises:
        MissingDependencyError: they do not fit; the message has both numbers, and what one slot takes.
    """
    left = available_memory(root)
    layouts = [_layout_with_rows(bundle) for bundle in bundles]
    whole, fewest = (
        sum(least_bytes(*pair, rows) for pair in zip(bundles, layouts, strict=True)) for rows in (slots, 1)
    )
    if left is None or whole <= left:
        return
    names = ", ".join(str(bundle.path) for bundle in bundles)
    one = f" ({fewest / 1e6:,.1f} MB with --slots 1)" if fewest < whole else ""
    way = "give fewer slots, " if fewest <= left else ""
    raise MissingDependencyError(
        f"{names}: --slots {slots} takes at least {whole / 1e6:,.1f} MB of memory{one}, this process has "
        f"{left / 1e6:,.1f} MB left: {way}free some, or raise the limit of the container"
    )


def _layout_with_rows(bundle: Bundle) -> Layout:
    return bundle.layout("static" if "static" in bundle.manifest.layouts else None)


def least_bytes(bundle: Bundle, layout: Layout, rows: int = 1) -> int:
    """Weights, twice where they are widened from bfloat16, and the caches of `rows` as far as their size is fixed.

    A lower bound: activations and what ONNX Runtime lays out anew come on top.
    """
    weights: int = sum(entry["bytes"] for name, entry in bundle.manifest.files.items() if name.endswith(".safetensors"))
    widened = 2 if bundle.manifest.dtype == "bfloat16" else 1
    cache: int = sum(
        DTYPES[spec.dtype].nbytes(math.prod(size for size in spec.shape if isinstance(size, int)))
        for spec in layout.signature.inputs
        if spec.name.startswith("past") and sum(isinstance(size, str) for size in spec.shape) == 1
    )
    return weights * widened + rows * cache
