"""Selection methods and the sparse attention of a decode step."""

from sparse_serve_jax.attention.decode import LayerRows, Selector, decode_attention
from sparse_serve_jax.attention.methods import METHODS, Method, get_method

__all__ = ["METHODS", "LayerRows", "Method", "Selector", "decode_attention", "get_method"]
