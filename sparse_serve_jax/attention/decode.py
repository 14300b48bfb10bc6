"""Attention of one layer of a decode step: score, select, find, load, attend, commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

import pallas_kernels as kernels
from pallas_kernels.select import fits
from sparse_serve_jax.attention.methods import Method, check_products, get_method
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory.eviction import Turn
from sparse_serve_jax.memory.kv_cache import Hot
from sparse_serve_jax.memory.loads import Load


class Rows(NamedTuple):
  """The rows of a decode step, as every layer sees them."""

  lanes: Int32[Array, " B"]  # R for padding
  tables: Int32[Array, "B N"]
  n_blocks: Int32[Array, " B"]  # full blocks
  tail_tokens: Int32[Array, " B"]  # tokens in the tail, the new one included; 0 for padding
  steps: Int32[Array, " B"]  # the request's own step number
  threshold: Float32[Array, ""] | None = None  # of the stop test, if lists are progressive
  # Of each list, before a method's own budget. If a layer made them, XLA would add its counts, and attention wait.
  length: Int32[Array, "B K"] | None = None


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
  first; if `progressive`, until a stop test passes. Its threshold comes with the rows: one program serves all.
  """

  method: Method
  limit: int | None
  sinks: int
  window: int
  reduce: str
  progressive: bool
  group_blocks: int
  rule: kernels.StopRule = dataclasses.field(default_factory=kernels.StopRule)
  host_loop: bool = False  # the stop test is made between calls of the attention kernel

  @classmethod
  def of(cls, config: EngineConfig) -> Selector:
    sparse = config.sparse
    if sparse.group_reduce == "softmax":
      check_products(sparse.method, "group_reduce='softmax'")
    return cls(
      method=get_method(sparse.method, sparse.policy),
      limit={"dense": None, "topk": config.budget_blocks, "psa": 1 << 30}[sparse.policy],
      sinks=config.sink_blocks,
      window=config.window_blocks,
      reduce=sparse.group_reduce,
      progressive=sparse.policy == "psa",
      group_blocks=sparse.group_blocks,
      rule=kernels.StopRule(sparse.rest, sparse.stop_when),
      host_loop=sparse.stop == "host_loop",
    )

  @property
  def dense(self) -> Selector:
    """The same, attending to everything."""
    return dataclasses.replace(self, limit=None, progressive=False)

  @property
  def group(self) -> int | None:
    """Blocks of a list between two stop tests; None without tests."""
    return self.group_blocks if self.progressive else None

  @property
  def untested(self) -> int:
    """The first blocks of a list that no stop test may leave out: sinks and window, rounded up to whole groups."""
    return 0 if self.group is None else -(-(self.sinks + self.window) // self.group) * self.group

  def stop(self, rows: Rows) -> kernels.Stop:
    """The stop test of progressive lists."""
    assert rows.threshold is not None
    return kernels.Stop(rows.threshold, self.untested, self.rule)

  @property
  def takes(self) -> bool:
    """Whether the test is made in the attention kernel, and a block that misses takes its slot when it is read."""
    return self.progressive and not self.host_loop

  def lists_of(self, rows: Rows, n_heads: int) -> Rows:
    """The rows with the lengths of what this selects for them."""
    length = rows.n_blocks if self.limit is None else jnp.minimum(rows.n_blocks, self.limit)
    return rows._replace(length=jnp.broadcast_to(length[:, None], (len(length), n_heads)))

  def select(
    self, q: Float[Array, "B K G D"], hot: Hot, layer: Int32[Array, ""], rows: Rows, implementation: str
  ) -> tuple[Int32[Array, "B K n"], Int32[Array, "B K"]]:
    """Pool blocks in the order they are attended to, -1 beyond their list's length, and lengths.

    A table that the limit holds whole is not ranked, unless the order matters.
    """
    (_, width), length = rows.tables.shape, rows.length
    assert length is not None
    blocks = jnp.broadcast_to(rows.tables[:, None], (*length.shape, width))
    if self.limit is not None and (self.limit < width or self.progressive or self.method.budget is not None):
      ranking = kernels.Ranking(self.method.score, self.reduce, self.sinks, self.window)
      runs_on = self.method.runs_on(implementation)
      scores = kernels.score(q, hot.digest, layer, rows.tables, rows.n_blocks, ranking, implementation=runs_on)
      if self.method.instead is not None:
        scores = self.method.instead(scores, layer, rows, hot.tail.shape[4])
      listed, n = kernels.Listed(rows.tables, rows.n_blocks), min(self.limit, width)
      ranked, blocks = kernels.select(scores, n, listed, implementation=implementation if fits(width, n) else "xla")
      if self.method.budget is None:
        return blocks, length
      length = self.method.budget(ranked, length)
    return jnp.where(jnp.arange(blocks.shape[2])[None, None] < length[..., None], blocks, -1), length


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
  ) -> tuple[kernels.Partial, Hot, Counts, Turn]:
    """Attention over each row's selected blocks and tail.

    No layer writes the pool, so it is no result. `turn` is what the layers before have left of the step's victims.

    Returns:
      The result, [B, K, G, D]; `hot` with residency and slots updated; what the layer's lists came to; what is left of
      the victims.
    """
    tails = kernels.Tails(hot.tail, rows.lanes, rows.tail_tokens)
    lists = self.selector.select(q, hot, layer, rows, self.implementation)
    if self.selector.progressive and self.selector.host_loop:
      return self._in_rounds(q, tails, pool, hot, layer, rows, turn, lists)
    if self.selector.takes:
      return self._progressive(q, tails, pool, hot, layer, rows, turn, lists)

    def attend(slots, located):
      return kernels.attend(q, tails, pool, slots, layer, located, implementation=self.implementation)

    partial, hot, counts, given = self._read(attend, pool, hot, layer, rows, turn, lists)
    return partial, hot, counts, turn._replace(given=given)

  def _read(self, attend: Callable, pool, hot: Hot, layer, rows: Rows, turn: Turn, lists):
    """Finds, loads, attends to and commits `lists`, (blocks, lengths), of which all is read.

    Returns:
      What attend(slots, located) returns first; `hot` with slots and maps updated; counts; what is `given` afterwards.
    """
    on, here, (blocks, length) = dict(implementation=self.implementation), turn.at(layer, rows.lanes), lists
    found = kernels.propose(hot.maps, here.victims, layer, blocks, length, given=turn.given, **on)
    slots, located, copied = self.load(pool, hot, layer, found, self.implementation)
    result, attended, slots = attend(slots, located)
    maps = kernels.commit(hot.maps, layer, located, attended, hot.stamp(layer), rows.steps, **on)
    # Without slots the pool lies in HBM, and nothing misses.
    has_slots = slots.shape[0] > 0
    missed = found.missed(attended) if has_slots else jnp.zeros_like(attended)
    loaded = located.missed(attended) + copied if has_slots else missed
    given = turn.given + here.by_zone(found.given)
    return result, hot.replace(slots=slots, maps=maps), Counts(attended, missed, loaded), given

  def _progressive(self, q, tails: kernels.Tails, pool, hot: Hot, layer, rows: Rows, turn: Turn, lists):
    """Reads `lists` with the stop test in the attention kernel. A block that misses takes its slot when it is read."""
    on, (blocks, length) = dict(implementation=self.implementation), lists
    located = kernels.find(hot.maps, layer, blocks, length, group=self.selector.group, **on)
    here = turn.at(layer, rows.lanes)
    taking = kernels.Taking(self.selector.stop(rows), here.free)
    partial, attended, slots, located, free = kernels.attend_and_take(
      q, tails, pool, hot.slots, layer, located, taking, **on
    )
    missed = located.missed(attended) if slots.shape[0] > 0 else jnp.zeros_like(attended)
    maps = kernels.commit(hot.maps, layer, located, attended, hot.stamp(layer), rows.steps, **on)
    if free is not None:  # as many for the next call as have missed in this one
      maps, free = kernels.evict(maps, turn.victims, free, here.by_zone(missed), **on)
      turn = turn._replace(free=free._replace(zone=None))
    return partial, hot.replace(slots=slots, maps=maps), Counts(attended, missed, missed), turn

  def _in_rounds(self, q, tails: kernels.Tails, pool, hot: Hot, layer, rows: Rows, turn: Turn, lists):
    """Reads `lists` group by group, with a stop test after each outside of the attention kernel."""
    on, (blocks, length) = dict(implementation=self.implementation), lists
    rounds = kernels.Rounds(self.selector.group_blocks, self.selector.stop(rows))

    def attend(slots, located):
      by_block, slots = kernels.attend_by_block(q, tails, pool, slots, layer, located, **on)
      return by_block, located.length, slots

    def read_group(blocks, length, state):
      slots, maps, counts, given = state
      now, left = hot.replace(slots=slots, maps=maps), turn._replace(given=given)
      by_block, now, of_group, given = self._read(attend, pool, now, layer, rows, left, (blocks, length))
      return by_block, (now.slots, now.maps, jax.tree.map(jnp.add, counts, of_group), given)

    tail, slots = kernels.attend_to_tail(q, tails, pool, hot.slots, layer, **on)
    state = slots, hot.maps, Counts.zeros(length.shape[0], length.shape[1]), turn.given
    partial, (slots, maps, counts, given) = rounds.read(tail, blocks, length, read_group, state)
    return partial, hot.replace(slots=slots, maps=maps), counts, turn._replace(given=given)
