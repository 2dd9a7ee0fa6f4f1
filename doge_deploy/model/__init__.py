"""Export-friendly PyTorch: the Doge decoder with past tensors in and present tensors out.

Its custom operators run eagerly (they are the reference implementations of graph functions and of kernels) and trace to
single ONNX nodes.
"""
