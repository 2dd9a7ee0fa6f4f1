"""doge::DynamicMaskAttention as a chain of kernels."""
