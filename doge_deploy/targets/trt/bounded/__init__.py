"""Engines whose cache holds the window instead of the text.

bodies.py (the two attentions as ONNX text), lowering.py (the pass that puts them into a graph), parts.py (what is built:
a graph for decoding, one for prefill).
"""
