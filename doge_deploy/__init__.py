"""Deployment compiler for Doge: a checkpoint in, a verified ONNX bundle out."""

__version__ = "0.1.0"
