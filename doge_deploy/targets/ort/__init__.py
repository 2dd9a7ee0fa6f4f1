"""Lowerings for ONNX Runtime's CPU provider."""

from __future__ import annotations

from doge_deploy.targets.ort.bfloat16 import WidenBfloat16Pass, widen_bfloat16
from doge_deploy.targets.ort.float4 import WidenFloat4Pass, widen_float4
from doge_deploy.targets.ort.lower import Lowering, lower

__all__ = ["Lowering", "WidenBfloat16Pass", "WidenFloat4Pass", "lower", "widen_bfloat16", "widen_float4"]
