"""Operators and their kernels: a plain PyTorch one each, and faster ones where the machine has them."""
