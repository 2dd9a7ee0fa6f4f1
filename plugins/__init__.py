"""Doge's two operators as Triton kernels; one folder an operator, see README.md."""
