"""Examples from the whole space of configs and calls."""
