"""From the PyTorch model to the standard ONNX graph: schemas and bodies of the `doge` operators, trace, passes,
weights.
"""
