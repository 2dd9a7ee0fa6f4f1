"""Names of what can run a bundle; the command line must not load any of it to know them."""

from __future__ import annotations

from typing import Literal

Backend = Literal["ort", "trt", "trt-rtx"]
"""ONNX Runtime, or an engine of TensorRT or TensorRT-RTX."""

BACKENDS: tuple[Backend, ...] = ("ort", "trt", "trt-rtx")

TORCH_KERNELS: Literal["torch-kernels"] = "torch-kernels"
"""What only `verify` takes besides: the traced model in PyTorch, with the plugins' kernels for its two operators."""
