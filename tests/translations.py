"""torch.onnx collects the translations of all operators anew for every trace: 0.3 s of the 1.6 s of a small export.

A process of tests collects them once. What a trace adds is its own: lists and dictionary are copied.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry

_collect = functools.cache(ONNXRegistry.from_torchlib)


def _copy(*arguments: Any, **options: Any) -> ONNXRegistry:
    found = _collect(*arguments, **options)
    registry = ONNXRegistry()
    registry.__dict__.update(found.__dict__)
    registry.functions = {name: list(translations) for name, translations in found.functions.items()}
    return registry


def collect_once() -> None:
    """From now on in this process."""
    ONNXRegistry.from_torchlib = staticmethod(_copy)  # type: ignore[assignment]
