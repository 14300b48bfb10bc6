"""Attention of one layer of a decode step: score, select, find, load, attend, commit."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

import pallas_kernels as kernels
from pallas_kernels.select import fits
from sparse_serve_jax.attention.methods import Method, get_method
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory.eviction import Turn
from sparse_serve_jax.memory.kv_cache import Hot
from sparse_serve_jax.memory.loads import Load, fused


class Rows(NamedTuple):
  """The rows of a decode step, as every layer sees them."""

  lanes: Int32[Array, " B"]  # R for padding
  tables: Int32[Array, "B N"]
  n_blocks: Int32[Array, " B"]  # full blocks
  tail_tokens: Int32[Array, " B"]  # tokens in the tail, the new one included; 0 for padding
  steps: Int32[Array, " B"]  # the request's own step number


class Counts(NamedTuple):
  """What a layer's lists came to; summed over the layers of a step."""

  attended: Int32[Array, "B K"]  # full blocks
  missed: Int32[Array, "B K"]  # of these, those that were in no slot before the load
  loaded: Int32[Array, "B K"]  # read from the pool: copied by the load, and what missed after it

  @classmethod
  def zeros(cls, n_rows: int, n_heads: int) -> Counts:
    zero = jnp.zeros((n_rows, n_heads), jnp.int32)
    return cls(zero, zero, zero)


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
  def untested(self) -> int:
    """The first blocks of a list that no stop test may leave out: sinks and window, rounded up to whole groups."""
    return 0 if self.group is None else -(-(self.sinks + self.window) // self.group) * self.group

  @property
  def stop(self) -> kernels.Stop | None:
    return None if self.threshold is None else kernels.Stop(self.threshold, self.untested)

  def select(
    self, q: Float[Array, "B K G D"], hot: Hot, layer: Int32[Array, ""], rows: Rows, implementation: str
  ) -> tuple[Int32[Array, "B K n"], Int32[Array, "B K"]]:
    """Pool blocks in the order they are attended to, -1 beyond their list's length, and lengths."""
    n_rows, n_heads = q.shape[:2]
    width = rows.tables.shape[1]
    if self.limit is None:
      ids = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (n_rows, n_heads, width))
      length = jnp.broadcast_to(rows.n_blocks[:, None], (n_rows, n_heads))
    else:
      n = min(self.limit, width)
      ranking = kernels.Ranking(self.method.score, self.reduce, self.sinks, self.window)
      runs_on = self.method.runs_on(implementation)
      scores = kernels.score(q, hot.digest, layer, rows.tables, rows.n_blocks, ranking, implementation=runs_on)
      ranked, ids = kernels.select(scores, n, implementation=implementation if fits(width, n) else "xla")
      length = jnp.broadcast_to(jnp.minimum(rows.n_blocks, n)[:, None], (n_rows, n_heads))
      length = self.method.budget(ranked, length)
    blocks = jnp.take_along_axis(rows.tables[:, None], ids, -1)
    return jnp.where(jnp.arange(blocks.shape[-1])[None, None] < length[..., None], blocks, -1), length


@dataclasses.dataclass(frozen=True)
class DecodeAttention:
  """What is fixed of a layer's attention when a program is compiled."""

  selector: Selector
  load: Load
  implementation: str

  @property
  def dense(self) -> DecodeAttention:
    return dataclasses.replace(self, selector=self.selector.dense)

  def __call__(
    self,
    q: Float[Array, "B K G D"],
    pool: Float[Array, "K L M 2 S D"],
    hot: Hot,
    layer: Int32[Array, ""],
    rows: Rows,
    turn: Turn,
  ) -> tuple[Float32[Array, "B K G D"], Hot, Counts, Turn]:
    """Attention over each row's selected blocks and tail.

    No layer writes the pool, so it is no result. `turn` is what the layers before have left of the step's victims.

    Returns:
      The output; `hot` with residency and slots updated; what the layer's lists came to; what is left of the victims.
    """
    on, stop, takes = dict(implementation=self.implementation), self.selector.stop, self.load is fused
    here, has_slots = turn.at(layer, rows.lanes), hot.slots.shape[0] > 0
    blocks, length = self.selector.select(q, hot, layer, rows, self.implementation)
    if stop is None:
      found = kernels.propose(hot.maps, here.victims, layer, blocks, length, given=turn.given, **on)
    else:
      found = kernels.find(hot.maps, layer, blocks, length, group=self.selector.group, **on)
    free = here.free
    if stop is not None and free is not None and not takes:  # a load copies ahead, to the end of the lists
      place, free = free.take((found.blocks >= 0) & ~found.hit, turn.zone(layer, rows.lanes))
      found = found._replace(place=place)
    slots, located, copied = self.load(pool, hot.slots, layer, found, self.implementation)
    tails = kernels.Tails(hot.tail, rows.lanes, rows.tail_tokens)
    if stop is not None and free is not None and takes:
      taking = kernels.Taking(stop, free)
      taken = kernels.attend_and_take(q, tails, pool, slots, layer, located, taking, **on)
      partial, attended, slots, located, free = taken
    else:
      partial, attended, slots = kernels.attend(q, tails, pool, slots, layer, located, stop, **on)
    maps = kernels.commit(hot.maps, layer, located, attended, hot.stamp(layer), rows.steps, **on)
    # Without slots the pool lies in HBM, and nothing misses.
    missed = found.missed(attended) if has_slots else jnp.zeros_like(attended)
    loaded = located.missed(attended) + copied if has_slots else missed
    if stop is None:
      turn = turn._replace(given=turn.given + here.by_zone(found.given))
    elif free is not None:  # as many for the next call as have missed in this one
      maps, free = kernels.evict(maps, turn.victims, free, here.by_zone(missed), **on)
      turn = turn._replace(free=free._replace(zone=None))
    return partial.output, hot.replace(slots=slots, maps=maps), Counts(attended, missed, loaded), turn
