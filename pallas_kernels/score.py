"""Scores: every block's digest against the query, read through the block tables.

A scoring rule is a pure function (q [..., G, D], digests [..., N, E, D]) -> [..., G, N], both float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Rule = Callable[[jax.Array, jax.Array], jax.Array]
_HIGHEST = jax.lax.Precision.HIGHEST


def box(q: jax.Array, digests: jax.Array) -> jax.Array:
  """sum_d max(q_d upper_d, q_d lower_d): the largest dot product with a key of the box (Quest, ArkVale)."""
  # max(q u, q l) = q+ u + q- l since u >= l; two matrix products instead of an N x D intermediate per head.
  upper, lower = digests[..., 0, :], digests[..., 1, :]
  dot = lambda a, b: jnp.einsum("...gd,...nd->...gn", a, b, precision=_HIGHEST)  # noqa: E731
  return dot(jnp.maximum(q, 0), upper) + dot(jnp.minimum(q, 0), lower)


def dot(q: jax.Array, digests: jax.Array) -> jax.Array:
  """Dot product with the one vector of the digest."""
  return jnp.einsum("...gd,...nd->...gn", q, digests[..., 0, :], precision=_HIGHEST)


def score(
  q: jax.Array,
  digest: jax.Array,
  layer: jax.Array,
  tables: jax.Array,
  n_blocks: jax.Array,
  *,
  rule: Rule,
  reduce: str = "mean",
  sinks: int = 0,
  window: int = 0,
) -> jax.Array:
  """Scores of all blocks of all rows.

  Args:
    q: [B, K, G, D].
    digest: [K, L, M, E, D], of which `layer` is read at `tables`.
    layer: scalar int32.
    tables: [B, N] int32, DRAM block of every logical block; entries at and beyond `n_blocks` are not used.
    n_blocks: [B] int32, full blocks of a row.
    rule: the scoring rule.
    reduce: "mean" or "max" over the G query heads of a KV head.
    sinks: the first blocks that are always attended, scored +inf.
    window: likewise the last full blocks.

  Returns:
    [B, K, N] float32, -inf for blocks that do not exist.
  """
  k = jnp.arange(digest.shape[0])[None, :, None]
  gathered = digest[k, layer, tables[:, None, :]].astype(jnp.float32)  # [B, K, N, E, D]
  by_head = rule(q.astype(jnp.float32), gathered)  # [B, K, G, N]
  scores = by_head.max(2) if reduce == "max" else by_head.mean(2)
  n = jnp.arange(tables.shape[1])[None]  # [1, N]
  last = n_blocks[:, None]
  always = (n < sinks) | (n >= last - window)
  scores = jnp.where(always[:, None], jnp.inf, scores)
  return jnp.where((n < last)[:, None], scores, -jnp.inf)


def select(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k highest of scores [B, K, N], descending, and their logical ids int32 [B, K, k]; ties to the lowest id."""
  ranked, ids = jax.lax.top_k(scores, k)
  return ranked, ids.astype(jnp.int32)
