"""Lowerings of the standard graph, one target a folder."""
