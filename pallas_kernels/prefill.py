"""Dense causal attention of a piece of a prompt, over itself and over earlier blocks of the same layer."""

from __future__ import annotations

import jax

from pallas_kernels import reference
from pallas_kernels.copy import gather_blocks


def prefill_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  pool: jax.Array,
  slots: jax.Array,
  layer: jax.Array,
  prefix: tuple[jax.Array, jax.Array] | None,
  prefix_tokens: jax.Array,
  *,
  scale: float,
  implementation: str = "xla",
) -> jax.Array:
  """Attention output [T, K, G, D] of the queries of a piece.

  Args:
    q: [T, K, G, D].
    k: [T, K, D], the piece's own keys; causal.
    v: [T, K, D].
    pool: [K, L, M, 2, S, D].
    slots: [P, 2, S, D].
    layer: scalar int32.
    prefix: what comes before the piece: DRAM blocks [K, N] int32 and their slots [K, N] int32, -1 where they are to be
      read from the pool. None: the piece begins the prompt.
    prefix_tokens: int32, tokens before the piece. Blocks of `prefix` beyond them may be anything.
    scale: multiplies the dot products.
    implementation: of the reads from the pool: "xla", "triton" or "interpret". The attention is XLA's.
  """
  earlier = None
  if prefix is not None:
    earlier = gather_blocks(pool, slots, layer, *prefix, implementation=implementation)
  return reference.prefill_attention(q, k, v, earlier, prefix_tokens, scale=scale)
