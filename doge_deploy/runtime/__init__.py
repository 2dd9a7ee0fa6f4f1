"""Run a bundle: neither torch nor transformers nor the graph room is imported here."""
