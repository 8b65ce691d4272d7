"""Triton kernels, one a file, and the backend that calls them."""
