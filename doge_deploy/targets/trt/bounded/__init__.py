"""Engines whose cache holds the window instead of the text.

choices.py (where that is so), bodies.py (the two attentions as ONNX text), lowering.py (the pass that puts them into a
graph).
"""
