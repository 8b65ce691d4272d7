"""Depth attention in Triton: a file has its kernels, their custom op and its gradient; `backend` makes ops of them."""
