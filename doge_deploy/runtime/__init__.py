"""Run a bundle: neither torch nor transformers nor the graph package is imported here."""
