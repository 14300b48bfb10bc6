"""What the kernels of `attend` share: their refs, the loops over a list's blocks where these lie, and the launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.free import Free
from pallas_kernels.maps import only
from pallas_kernels.stop import LOG2_E, StopRule

WARP_BYTES = 8 << 10  # of a block, keys and values, for each warp; from 2 to 8 warps
STAGES = 5  # a block is two loads, keys and values: two blocks are on their way while one is multiplied


class Refs(NamedTuple):
  """What a kernel reads, in the order of its operands."""

  layer: Any  # [1]
  lanes: Any  # [B]
  tokens: Any  # [B]
  blocks: Any  # [B, K, n]
  slot: Any  # [B, K, n]
  place: Any  # [B, K, n]
  n_hits: Any  # [B, K, n / group]
  length: Any  # [B, K]
  q: Any  # [B, K, G, D]
  tail: Any  # [K, L, R, 2, S, D]
  pool: Any  # [K, L, M, 2, S, D]
  slots: Any  # [P, 2, S, D], which it writes too: the result's ref, of one memory with the operand

  @property
  def n_lists(self) -> int:
    return self.length.shape[0] * self.length.shape[1]


class QueueRefs(NamedTuple):
  """Free slots, and then what a kernel writes of them; `place` is the one it reads, too."""

  slots: Any  # [Z, W]
  made: Any  # [Z]
  zone: Any  # [B] or [1]
  place: Any  # [B, K, n]
  taken: Any  # [Z]

  def take(self, of: List, first, end, width: int) -> Callable[[jax.Array], jax.Array]:
    """Slots for ranks [first, end) of a list, at most `width`, which are written down; a function of the rank."""
    zone = self.zone[of.b if self.zone.shape[0] > 1 else 0]
    start = triton.atomic_add(self.taken, zone, end - first)
    rank, made = first + jnp.arange(width), self.made[zone]

    def slot_of(i):
      at = start + (i - first)
      found = (i < end) & (at < made)
      return jnp.where(found, self.slots[zone, jnp.where(found, at, 0)], -1)

    slot, (_, _, n) = slot_of(rank), self.place.shape
    triton.store(self.place.at[of.b, of.k, only(rank < end, rank, n)], slot, mask=rank < end)
    return slot_of


class PartialRefs(NamedTuple):
  """Partial results that a kernel writes or reads."""

  o: Any  # [parts, G, D]
  m: Any  # [parts, G]
  l: Any  # [parts, G]


class Acc(NamedTuple):
  """A partial result, logarithms to base 2; query heads are padded to [heads]."""

  o: jax.Array  # [heads, D]
  m: jax.Array  # [heads]
  l: jax.Array  # [heads]
  group: jax.Array  # [heads], of the masses of a group: the log of the least, or the sum as `l` is one


class List(NamedTuple):
  """A list as a program sees it."""

  b: jax.Array
  k: jax.Array
  queries: jax.Array  # [heads, D]


class Program:
  """Loops over ranks [first, end) of a list, each acc -> acc.

  Without slots every block is read from the pool, and is no miss. `rule` is that of the stop test, None without one.
  """

  def __init__(self, refs: Refs, has_slots: bool, rule: StopRule | None = None):
    n_group, depth = refs.q.shape[2:]
    heads = max(triton.LEAST_TILE, pl.next_power_of_2(n_group))
    self.refs, self.has_slots, self.layer, self.scale = refs, has_slots, refs.layer[0], depth**-0.5
    self.of_head = jnp.minimum(jnp.arange(heads), n_group - 1)  # the last head stands in for those that pad
    self.least = rule is not None and rule.least
    self.sums = rule is not None and not self.least
    self.infinite = jnp.full((heads,), jnp.inf)
    self.zero = Acc(jnp.zeros((heads, depth)), -self.infinite, jnp.zeros((heads,)), self.no_group())

  def no_group(self) -> jax.Array:
    """`Acc.group` before the first block of a group."""
    return jnp.full(self.of_head.shape, jnp.inf if self.least else 0.0)

  def open(self, i: jax.Array) -> List:
    """List `i` of B x K."""
    n_heads = self.refs.q.shape[1]
    b, k = jax.lax.div(i, n_heads), jax.lax.rem(i, n_heads)
    return List(b, k, self.refs.q[b, k, self.of_head])

  def close(self, to: PartialRefs, part: jax.Array, acc: Acc) -> None:
    """Writes what is known of part of a list, with natural logarithms."""
    at = part, self.of_head
    to.o[at], to.m[at] = acc.o, acc.m * (1 / LOG2_E)
    to.l[at] = acc.l

  def update(self, of: List, acc: Acc, keys, values, valid=None) -> Acc:
    """One block more, keys and values [S, D], of which `valid` [S] count."""
    o, m, l, group = acc
    s = triton.dot(of.queries, keys, trans_b=True) * (self.scale * LOG2_E)  # [heads, S]
    if valid is not None:
      s = jnp.where(valid[None], s, -jnp.inf)
      values = jnp.where(valid[:, None], values, jnp.zeros_like(values))  # 0 * NaN is NaN
    top = jnp.maximum(m, s.max(1))
    p, old = jnp.exp2(s - top[:, None]), jnp.exp2(m - top)
    mass = p.sum(1)
    if self.least:
      group = jnp.minimum(group, top + jnp.log2(mass))
    if self.sums:
      group = group * old + mass
    o = o * old[:, None] + triton.dot(p.astype(values.dtype), values)
    return Acc(o, top, l * old + mass, group)

  def read_tail(self, of: List, acc: Acc, wanted: jax.Array | bool) -> Acc:
    tail = self.refs.tail
    lane = jnp.minimum(self.refs.lanes[of.b], tail.shape[2] - 1)
    n, block_tokens = self.refs.tokens[of.b], tail.shape[4]

    def body(_, acc):
      keys, values = tail[of.k, self.layer, lane, 0], tail[of.k, self.layer, lane, 1]
      read = self.update(of, acc, keys, values, valid=jnp.arange(block_tokens) < n)
      return read._replace(group=acc.group)  # the tail is of no group

    return jax.lax.fori_loop(0, (wanted & (n > 0)).astype(jnp.int32), body, acc)

  def read_hits(self, of: List, first, end, acc: Acc) -> Acc:
    pool, slots = self.refs.pool, self.refs.slots

    def body(i, acc):
      if self.has_slots:
        at = self.refs.slot[of.b, of.k, i]
        return self.update(of, acc, slots[at, 0], slots[at, 1])
      block = self.refs.blocks[of.b, of.k, i]
      return self.update(of, acc, pool[of.k, self.layer, block, 0], pool[of.k, self.layer, block, 1])

    return jax.lax.fori_loop(first, end, body, acc)

  def read_misses(self, of: List, first, end, acc: Acc, queue: QueueRefs | None = None, width: int = 0) -> Acc:
    """Copies the blocks to their places, too: those of the list, or of the queue for at most `width` blocks."""
    pool, slots = self.refs.pool, self.refs.slots
    place = queue.take(of, first, end, width) if queue else None

    def body(i, acc):
      block, to = self.refs.blocks[of.b, of.k, i], place(i) if place else self.refs.place[of.b, of.k, i]

      def read(half):  # one half at a time takes fewer registers
        x = pool[of.k, self.layer, block, half]
        triton.store(slots.at[jnp.maximum(to, 0), jnp.int32(half)], x, mask=jnp.broadcast_to(to >= 0, x.shape))
        return x

      return self.update(of, acc, read(0), read(1))

    return jax.lax.fori_loop(first, end, body, acc)


def misses_first(miss_programs: int, n: int, read_misses: Callable, read_hits: Callable) -> None:
  """The first programs share the misses of `n` units, so that PCIe is busy from the start; the others read hits, each
  what is its by number."""
  me = pl.program_id(0)
  if not miss_programs:
    return read_hits(me)

  @pl.when(me < miss_programs)
  def _():
    turns = jax.lax.div(n - me + (miss_programs - 1), miss_programs)
    jax.lax.fori_loop(0, turns, lambda j, _: read_misses(me + j * miss_programs), None)

  @pl.when(me >= miss_programs)
  def _():
    read_hits(me - miss_programs)


def partial_shapes(n: int, n_group: int, depth: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Of what `PartialRefs` point to."""
  return tuple(jax.ShapeDtypeStruct((n, n_group, *of), jnp.float32) for of in ((depth,), (), ()))


def launch(
  kernel: Callable[[Refs, QueueRefs | None, Sequence, Sequence], None],
  operands: Refs,
  more: Sequence[jax.Array],
  shapes: Sequence[jax.ShapeDtypeStruct],
  programs: int,
  implementation: str,
  name: str,
  free: Free | None = None,
) -> tuple[tuple, Refs, Free | None]:
  """Runs a kernel.

  Args:
    kernel: called with refs of the operands, of the queue or None, of `more`, and of the results.
    operands: arrays.
    more: further operands.
    shapes: of results besides the slots.
    programs: of its grid.
    implementation: "triton" or "interpret".
    name: for profiles.
    free: what misses take slots from, if they take them when they are read.

  Returns:
    Results of those shapes; the operands with the slots and places that it leaves; what is left of `free`.
  """
  n, n_in, fields, queue, written = len(shapes), len(operands), Refs._fields, (), [operands.slots]
  n_more, aliases = n_in + len(more), {fields.index("slots"): n}
  if free is not None:
    queue = free.slots, free.made, np.zeros(1, np.int32) if free.zone is None else free.zone, free.taken
    written += [operands.place, free.taken]
    aliases |= {fields.index("place"): n + 1, n_more + 3: n + 2}

  def run(*refs):
    out = refs[n_more + len(queue) :]
    of_queue = QueueRefs(*refs[n_more : n_more + 3], *out[n + 1 :]) if queue else None
    kernel(Refs(*refs[:n_in])._replace(slots=out[n]), of_queue, refs[n_in:n_more], out[:n])

  block_bytes = math.prod(operands.pool.shape[3:]) * operands.pool.dtype.itemsize
  results = triton.call(
    run,
    out_shape=(*shapes, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written)),
    grid=(programs,),
    input_output_aliases=aliases,
    implementation=implementation,
    num_warps=min(8, max(2, block_bytes // WARP_BYTES)),
    num_stages=STAGES,
    name=name,
  )(*operands, *more, *queue)
  operands = operands._replace(slots=results[n])
  if free is not None:
    operands, free = operands._replace(place=results[n + 1]), free._replace(taken=results[n + 2])
  return results[:n], operands, free
