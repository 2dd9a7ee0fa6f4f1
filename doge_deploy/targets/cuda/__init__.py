"""The lowering for ONNX Runtime's CUDA provider."""
