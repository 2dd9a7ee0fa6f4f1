"""Bundles in ONNX Runtime's CUDA provider."""

from doge_deploy.runtime.cuda.open import open_runner
from doge_deploy.runtime.cuda.runner import CudaRunner

__all__ = ["CudaRunner", "open_runner"]
