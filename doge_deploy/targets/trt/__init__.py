"""Lowering and build for TensorRT and TensorRT-RTX, which share all of it but the plugins.

lowering.py (what becomes of the graph), plugins.py (the door for plugins), profiles.py (which shapes), vendor.py (the
two products), network.py (parse and configure), worker.py (a build in a process of its own), layers.py (what the
vendor says about the result).
"""
