"""What a machine is and what NVIDIA's libraries can do on it.

facts.py            DeviceFacts: the section `device` of a file in export_configs/
host.py             what Linux says about this machine
tensorrt_limits.py  what TensorRT and TensorRT-RTX need and can do, with its source
"""
