"""The plugins' kernels on the device that they are for: recorded here, run and compared there.

What judges (`judge.py`, `device.py`) needs NumPy and cuda.core alone: no Triton, no PyTorch, no TensorRT.
"""
