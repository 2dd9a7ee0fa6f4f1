"""Engines whose cache holds the window: the runner and both graphs on a stand-in, against the standard graph and
against transformers."""
