"""doge::CDMoE as a chain of kernels."""
