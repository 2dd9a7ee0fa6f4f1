"""Names of backends that the command line must know without asking what is installed."""

from __future__ import annotations

from typing import Literal

DEFAULT_BACKEND = "ort"
"""What runs a bundle where nothing else is asked for."""

TORCH_KERNELS: Literal["torch-kernels"] = "torch-kernels"
"""What only `verify` takes besides: the traced model in PyTorch, with the plugins' kernels for its two operators."""
