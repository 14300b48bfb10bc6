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
  def stop(self) -> kernels.Stop | None:
    """The stop test. It may not leave out sinks and window, rounded up to whole groups."""
    if self.threshold is None:
      return None
    untested = -(-(self.sinks + self.window) // self.group_blocks) * self.group_blocks
    return kernels.Stop(self.threshold, untested)

  def select(
    self, q: jax.Array, cache: KVCache, layer: jax.Array, at: LayerRows, implementation: str
  ) -> tuple[jax.Array, jax.Array]:
    """DRAM blocks [B, K, n] in the order they are attended to, -1 beyond their length, and the length [B, K]."""
    n_rows, n_heads = q.shape[:2]
    width = at.tables.shape[1]
    if self.limit is None:
      ids = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (n_rows, n_heads, width))
      length = jnp.broadcast_to(at.n_blocks[:, None], (n_rows, n_heads))
    else:
      n = min(self.limit, width)
      scores = kernels.score(
        q,
        cache.digest,
        layer,
        at.tables,
        at.n_blocks,
        kernels.Ranking(self.method.score, self.reduce, self.sinks, self.window),
        implementation=self.method.runs_on(implementation),
      )
      ranked, ids = kernels.select(scores, n, implementation=implementation if fits(width, n) else "xla")
      length = jnp.broadcast_to(jnp.minimum(at.n_blocks, n)[:, None], (n_rows, n_heads))
      length = self.method.budget(ranked, length)
    blocks = jnp.take_along_axis(at.tables[:, None], ids, -1)
    return jnp.where(jnp.arange(blocks.shape[-1])[None, None] < length[..., None], blocks, -1), length


def decode_attention(
  selector: Selector,
  q: jax.Array,
  cache: KVCache,
  layer: jax.Array,
  at: LayerRows,
  pool: jax.Array,
  victims: kernels.Victims,
  given: jax.Array,
  implementation: str,
) -> tuple[jax.Array, KVCache, jax.Array, jax.Array]:
  """Attention of q [B, K, G, D] over each row's selected blocks and tail.

  The pool is an argument of its own and no part of `cache`: no layer writes it, so no loop has to carry it.
  `victims` are the step's, `given` how many of the first of them the layers before have used, int32.

  Returns:
    o [B, K, G, D] float32; the cache with residency and slots updated; int32 [2, B, K]: blocks attended, and of these
    missed; `given` for the next layer.
  """
  on = dict(implementation=implementation)
  blocks, length = selector.select(q, cache, layer, at, implementation)
  located = kernels.propose(cache.maps, victims, layer, blocks, length, given=given, group=selector.group, **on)
  tails = kernels.Tails(cache.tail, at.rows, at.tail_tokens)
  partial, attended, slots = kernels.attend(q, tails, pool, cache.slots, layer, located, selector.stop, **on)
  maps = kernels.commit(cache.maps, layer, located, attended, cache.stamp(layer), at.steps, **on)
  has_slots = slots.shape[0] > 0  # otherwise the pool lies in HBM, and nothing misses
  missed = located.missed(attended) if has_slots else jnp.zeros_like(attended)
  given = given + located.given(attended)
  return partial.output, cache.replace(slots=slots, maps=maps), jnp.stack([attended, missed]), given
