"""Bundles in ONNX Runtime."""

from __future__ import annotations

from doge_deploy.runtime.ort.open import open_runner
from doge_deploy.runtime.ort.runners import GrowingOrtRunner, OrtRunner
from doge_deploy.runtime.ort.session import graph_file, open_session

__all__ = ["GrowingOrtRunner", "OrtRunner", "graph_file", "open_runner", "open_session"]
