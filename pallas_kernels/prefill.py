"""Dense causal attention of a token chunk, over itself and over earlier blocks of the same layer."""

from __future__ import annotations

import jax

from pallas_kernels import reference


def prefill_attention(
  q: jax.Array,
  kv: jax.Array,
  prefix: jax.Array | None,
  prefix_tokens: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """Attention output [T, K, G, D] of queries [T, K, G, D].

  Args:
    q: queries of the chunk.
    kv: [K, T / S, 2, S, D], the chunk's own keys and values, block-major; causal.
    prefix: [K, N, 2, S, D], earlier blocks of the layer; None: the chunk begins the prompt.
    prefix_tokens: int32, how many of the prefix's tokens come before the chunk. What lies beyond may hold anything.
    scale: multiplies the dot products.
  """
  return reference.prefill_attention(q, kv, prefix, prefix_tokens, scale=scale)
