"""What NVIDIA's two inference libraries need and can do, as far as this tool depends on it.

The numbers are the vendor's, with their place; a test compares them with the libraries that are installed.
"""

from __future__ import annotations

from doge_deploy.devices.versions import at_least

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX 1.7 compiles for: its enumeration `ComputeCapability`.

Reference: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html
"""

RTX_PORTABLE = ("8.6", "8.9", "12.0")
"""Those that an engine covers unless others are named; same page."""

TRT_FIRST_CAPABILITY = "7.5"
"""TensorRT 11 runs on Turing and later.

Reference: https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/getting-started/support-matrix.html
"""

TRT_FIRST_NATIVE_LAYERS = "10.15.1"
"""The first TensorRT with native layers for rotary embedding and for in-place cache updates, which every lowering
of this tool has. Those after it and before the one in constraints.txt have not been tried.

Reference: https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/work-with-transformers.html
"""

TRT_FIRST_AOT_PLUGINS = "10.9.0"
"""The first TensorRT with plugins in Python whose kernels are compiled ahead of time.

Reference: https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/release-notes-10/10.9.0.html
"""

TOPK_LIMIT = 3840
"""The largest K of either library's TopK.

Reference: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/TopK.html
"""

TENSORRT_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
}
"""Names in `tensorrt.DataType` of what may be bound to an engine or given to a plugin. Both refuse bool."""

BF16_FIRST_CAPABILITY = "8.0"
"""bfloat16 arithmetic came with Ampere; same support matrices."""


def supports_dtype(capability: str, dtype: str) -> bool:
    """Whether a GPU computes in `dtype` (fp32, fp16 or bf16)."""
    return dtype != "bf16" or at_least(capability, BF16_FIRST_CAPABILITY)
