"""Attention of one layer of a decode step: score, select, propose, attend, commit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

import pallas_kernels as kernels
from pallas_kernels.select import fits
from sparse_serve_jax.attention.methods import Method, get_method
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class LayerRows:
  """The rows of a decode step, as every layer sees them."""

  rows: jax.Array  # [B] int32, resident row; R for padding
  tables: jax.Array  # [B, N] int32
  n_blocks: jax.Array  # [B] int32, full blocks
  tail_tokens: jax.Array  # [B] int32, tokens in the tail, the new one included; 0 for padding
  steps: jax.Array  # [B] int32, the request's own step number


@dataclasses.dataclass(frozen=True)
class Selector:
  """What a layer attends to, in blocks.

  `limit` None: every block, in order of position (dense). Otherwise the `limit` best by `method`, sinks and window
  first; with a `threshold`, progressively until it is passed.
  """

  method: Method
  limit: int | None
  sinks: int
  window: int
  reduce: str
  threshold: float | None
  group_blocks: int

  @classmethod
  def of(cls, config: EngineConfig) -> Selector:
    sparse = config.sparse
    return cls(
      method=get_method(sparse.method),
      limit={"dense": None, "topk": config.budget_blocks, "psa": 1 << 30}[sparse.policy],
      sinks=config.sink_blocks,
      window=config.window_blocks,
      reduce=sparse.group_reduce,
      threshold=sparse.threshold if sparse.policy == "psa" else None,
      group_blocks=sparse.group_blocks,
    )

  @property
  def dense(self) -> Selector:
    """The same, attending to everything."""
    return dataclasses.replace(self, limit=None, threshold=None)

  @property
  def group(self) -> int | None:
    """Blocks of a list between two stop tests; None without tests."""
    return None if self.threshold is None else self.group_blocks

  @property
  def always(self) -> int:
    """The first blocks of a list that no stop test may leave out: sinks and window, rounded up to whole groups."""
    return 0 if self.group is None else -(-(self.sinks + self.window) // self.group) * self.group

  def select(
    self, q: jax.Array, cache: KVCache, layer: jax.Array, at: LayerRows, implementation: str
  ) -> tuple[jax.Array, jax.Array]:
    """DRAM blocks [B, K, n] in the order they are attended to, -1 beyond their count, and the count [B, K]."""
    n_rows, n_heads = q.shape[:2]
    width = at.tables.shape[1]
    if self.limit is None:
      ids = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (n_rows, n_heads, width))
      count = jnp.broadcast_to(at.n_blocks[:, None], (n_rows, n_heads))
    else:
      n = min(self.limit, width)
      scores = kernels.score(
        q,
        cache.digest,
        layer,
        at.tables,
        at.n_blocks,
        rule=self.method.score,
        reduce=self.reduce,
        sinks=self.sinks,
        window=self.window,
        implementation=self.method.runs_on(implementation),
      )
      ranked, ids = kernels.select(scores, n, implementation=implementation if fits(width, n) else "xla")
      count = jnp.broadcast_to(jnp.minimum(at.n_blocks, n)[:, None], (n_rows, n_heads))
      count = self.method.budget(ranked, count)
    blocks = jnp.take_along_axis(at.tables[:, None], ids, -1)
    return jnp.where(jnp.arange(blocks.shape[-1])[None, None] < count[..., None], blocks, -1), count


def decode_attention(
  selector: Selector,
  q: jax.Array,
  cache: KVCache,
  layer: jax.Array,
  at: LayerRows,
  pool: jax.Array,
  order: kernels.EvictionOrder,
  taken: jax.Array,
  implementation: str,
) -> tuple[jax.Array, KVCache, jax.Array]:
  """Attention of q [B, K, G, D] over each row's selected blocks and tail.

  `cache` is without its pool, which is passed apart: no layer writes it, so it need not be carried through the layers.
  `order` are those of the step, `taken` the misses [B, K] of the layers before.

  Returns:
    o [B, K, G, D] float32; the cache with residency and slots updated; int32 [2, B, K]: blocks attended, and of these
    missed.
  """
  blocks, count = selector.select(q, cache, layer, at, implementation)
  reads = kernels.propose(
    cache.maps,
    order,
    layer,
    blocks,
    taken=taken,
    group=selector.group,
    implementation=implementation,
  )
  partial, used, slots = kernels.attend(
    q,
    cache.tail,
    at.rows,
    at.tail_tokens,
    pool,
    cache.slots,
    layer,
    reads,
    count,
    always=selector.always,
    threshold=selector.threshold,
    scale=q.shape[-1] ** -0.5,
    implementation=implementation,
  )
  maps = kernels.commit(cache.maps, layer, reads, used, cache.stamp(layer), at.steps, implementation=implementation)
  has_slots = slots.shape[0] > 0  # otherwise the pool lies in HBM, and nothing misses
  missed = reads.missed(used) if has_slots else jnp.zeros_like(used)
  return partial.output, cache.replace(slots=slots, maps=maps), jnp.stack([used, missed])
