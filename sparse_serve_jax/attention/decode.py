"""Attention of one layer of a decode step: score, select, propose, attend, commit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

import pallas_kernels as kernels
from pallas_kernels import residency
from sparse_serve_jax.attention.methods import Method, get_method
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class Selector:
  """What one layer attends to, in blocks.

  `limit` None: every block, in order of position (dense). Otherwise the `limit` best by `method`, sinks and window
  first; with a `threshold`, progressively until the threshold is passed.
  """

  method: Method
  limit: int | None
  sinks: int
  window: int
  reduce: str
  threshold: float | None
  group: int

  @classmethod
  def of(cls, config: EngineConfig, *, dense: bool) -> Selector:
    sparse = config.sparse
    policy = "dense" if dense else sparse.policy
    return cls(
      method=get_method(sparse.method),
      limit={"dense": None, "topk": config.budget_blocks, "psa": 1 << 30}[policy],
      sinks=config.sink_blocks,
      window=config.window_blocks,
      reduce=sparse.group_reduce,
      threshold=sparse.threshold if policy == "psa" else None,
      group=sparse.group_blocks if policy == "psa" else 16,  # without a stop test, how much is gathered at a time
    )


@dataclasses.dataclass(frozen=True)
class DecodeRows:
  """The rows of a decode step, as every layer sees them."""

  rows: jax.Array  # [B] int32, resident row; R for padding
  tables: jax.Array  # [B, N] int32
  n_blocks: jax.Array  # [B] int32, full blocks
  tail_tokens: jax.Array  # [B] int32, tokens in the tail, the new one included; 0 for padding
  steps: jax.Array  # [B] int32, the request's own step number


def select(selector: Selector, q: jax.Array, cache: KVCache, layer: jax.Array, rows: DecodeRows):
  """DRAM blocks [B, K, n] in the order they are attended, and how many of them [B, K]."""
  n_rows, n_heads = q.shape[:2]
  n_table = rows.tables.shape[1]
  if selector.limit is None:
    ids = jnp.broadcast_to(jnp.arange(n_table, dtype=jnp.int32), (n_rows, n_heads, n_table))
    count = jnp.broadcast_to(rows.n_blocks[:, None], (n_rows, n_heads))
  else:
    scores = kernels.score.score(
      q,
      cache.digest,
      layer,
      rows.tables,
      rows.n_blocks,
      rule=selector.method.score,
      reduce=selector.reduce,
      sinks=selector.sinks,
      window=selector.window,
    )
    n = min(selector.limit, n_table)
    ids = kernels.score.select(scores, n)
    count = jnp.broadcast_to(jnp.minimum(rows.n_blocks, n)[:, None], (n_rows, n_heads))
    count = selector.method.budget(jnp.take_along_axis(scores, ids, -1), count)
  blocks = jnp.take_along_axis(rows.tables[:, None], ids, -1)
  return jnp.where(jnp.arange(blocks.shape[-1])[None, None] < count[..., None], blocks, -1), count


def decode_attention(
  selector: Selector,
  q: jax.Array,
  cache: KVCache,
  layer: jax.Array,
  rows: DecodeRows,
  pool: jax.Array,
  implementation: str,
) -> tuple[jax.Array, KVCache, jax.Array]:
  """Attention of q [B, K, G, D] over each row's selected blocks and tail.

  `cache` is without its pool, which is passed apart: no layer writes it, so it need not be carried through the layers.

  Returns:
    o [B, K, G, D] float32; the cache with residency and slots updated; int32 [2]: blocks attended, and of these missed.
  """
  blocks, count = select(selector, q, cache, layer, rows)
  proposal = residency.propose(cache.maps, layer, blocks)
  always = 0 if selector.limit is None else selector.sinks + selector.window
  partial, used, slots = kernels.attend(
    q,
    cache.tail,
    rows.rows,
    rows.tail_tokens,
    pool,
    cache.slots,
    layer,
    blocks,
    proposal,
    count,
    always=always,
    group=selector.group,
    threshold=selector.threshold,
    scale=q.shape[-1] ** -0.5,
    implementation=implementation,
  )
  stamp = cache.stamp(layer)
  maps = residency.commit(cache.maps, layer, blocks, proposal, used, stamp, rows.steps)
  reached = jnp.arange(blocks.shape[-1])[None, None] < used[..., None]
  missed = (
    (reached & ~proposal.hit).sum(dtype=jnp.int32) if cache.slots.shape[0] else jnp.int32(0)
  )  # no slots: the pool is HBM
  counts = jnp.stack([used.sum(dtype=jnp.int32), missed])
  return partial.output, cache.replace(slots=slots, **maps._asdict()), counts
