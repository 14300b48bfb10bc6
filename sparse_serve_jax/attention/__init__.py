"""Selection methods, the sparse attention of a decode step, and that of a prompt's piece."""

from sparse_serve_jax.attention.methods import METHODS, Method, get_method

__all__ = ["METHODS", "Method", "get_method"]
