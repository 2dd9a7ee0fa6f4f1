"""Engines of TensorRT and TensorRT-RTX.

plan.py says what is bound where, from the engine's record alone; runner.py is the Runner; device.py and product.py are
all that touches CUDA and the vendor's library.
"""

from doge_deploy.runtime.trt.product import open_runner

__all__ = ["open_runner"]
