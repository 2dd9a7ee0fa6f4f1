"""Bodies of the `doge` operators in standard ONNX of opset 24, one operator a file."""

from doge_deploy.graph.functions.activations import activation_function
from doge_deploy.graph.functions.cdmoe import cdmoe_function
from doge_deploy.graph.functions.dynamic_mask_attention import dynamic_mask_attention_function

__all__ = ["activation_function", "cdmoe_function", "dynamic_mask_attention_function"]
