"""Parity of a bundle with transformers in eager mode, by numbers."""
