"""Attention of one decode step: every selected block is read where it lies, a slot in HBM or the pool in host memory.

Blocks that miss are copied into slots in the same pass, those proposed for them or, in `attend_and_take`, the next that
are free. With a stop test (`pallas_kernels.stop`) this is progressive sparse attention (PSA, arXiv 2503.00392, section
2.2): groups of blocks come in descending order of score, and a (row, KV head) stops after a group once the test passes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels import triton
from pallas_kernels.attend_xla import attend_xla
from pallas_kernels.chunks import Cut, merge_chunks, most_chunks, n_hits
from pallas_kernels.free import Free
from pallas_kernels.maps import only
from pallas_kernels.partial import Partial
from pallas_kernels.residency import Located
from pallas_kernels.stop import LOG2_E, Stop, StopRule

MISS_PROGRAMS = 64  # at most: keep PCIe busy and leave most SMs alone
WARP_BYTES = 8 << 10  # of a block, keys and values, for each warp; from 2 to 8 warps


class Tails(NamedTuple):
  """The unfinished last blocks, and which of them each row of the batch has."""

  kv: Float[Array, "K L R 2 S D"]  # of all resident requests
  lanes: Int32[Array, " B"]  # which request; R and beyond is padding, whose `tokens` is 0
  tokens: Int32[Array, " B"]  # tokens of the tail to attend to


def attend(
  q: Float[Array, "B K G D"],
  tails: Tails,
  pool: Float[Array, "K L M 2 S D"],
  slots: Float[Array, "P 2 S D"],
  layer: Int32[Array, ""] | int,
  located: Located,
  stop: Stop | None = None,
  *,
  implementation: str = "xla",
) -> tuple[Partial, Int32[Array, "B K"], Float[Array, "P 2 S D"]]:
  """Attends to a row's tail and to the first blocks of its list. Products are scaled by D ** -0.5.

  Args:
    q: the queries.
    tails: where each row's tail lies.
    pool: every finished block; host memory when offloading.
    slots: P may be 0: every block is then read from the pool.
    layer: of the pool and the tails.
    located: the lists and where their blocks lie, from `residency.propose`: one group for a list that is read whole,
      groups in descending order of score for a progressive one. What lies beyond a list's length is not read.
    stop: when a progressive list ends; the test is made between groups, of propose(group=...). None: lists are read
      whole.
    implementation: "xla", "triton" or "interpret".

  Returns:
    Partial of [B, K, G, D]; how many blocks were attended, the first ones of each list; `slots` with those of them in
    it that missed and have a place, in place when donated.

  Raises:
    ValueError: lists have no blocks, or are not grouped as `stop` needs it.
    NotImplementedError: a kernel was asked for and S or D is not a power of two.
  """
  _check(tails, located, stop, implementation)
  run = attend_xla if implementation == "xla" else functools.partial(_attend_kernel, implementation)
  return run(q, tails, pool, slots, layer, located, (stop, None))[:3]


class Taking(NamedTuple):
  """How progressive lists are read whose misses take slots when they are read."""

  stop: Stop
  free: Free | None  # with the zone of the lists, if there are several; None without slots


class Taken(NamedTuple):
  """What `attend_and_take` leaves."""

  partial: Partial
  attended: Int32[Array, "B K"]  # the first so many blocks of each list have been read
  slots: Float[Array, "P 2 S D"]
  located: Located  # with the places that misses took
  free: Free | None  # what is left


def attend_and_take(
  q: Float[Array, "B K G D"],
  tails: Tails,
  pool: Float[Array, "K L M 2 S D"],
  slots: Float[Array, "P 2 S D"],
  layer: Int32[Array, ""] | int,
  located: Located,
  taking: Taking,
  *,
  implementation: str = "xla",
) -> Taken:
  """`attend` to progressive lists of `residency.find`: a miss that is read takes the next free slot of its zone.

  Which slot that is depends on who comes first; which slots are taken does not.
  """
  stop, free = taking
  _check(tails, located, stop, implementation)
  if slots.shape[0] == 0 or free is None:
    return Taken(*attend(q, tails, pool, slots, layer, located, stop, implementation=implementation), located, free)
  run = attend_xla if implementation == "xla" else functools.partial(_attend_kernel, implementation)
  partial, attended, slots, place, taken = run(q, tails, pool, slots, layer, located, taking)
  return Taken(partial, attended, slots, located._replace(place=place), free._replace(taken=taken))


def _check(tails: Tails, located: Located, stop: Stop | None, implementation: str) -> None:
  triton.check(implementation, S=tails.kv.shape[4], D=tails.kv.shape[5])
  n_groups = located.n_hits.shape[-1]
  if located.blocks.shape[-1] == 0:
    raise ValueError("lists of 0 blocks")
  if stop is None and n_groups != 1:
    raise ValueError(f"a list that is read whole is one group of blocks, not {n_groups}")
  if stop is not None and n_groups > 1 and stop.untested % located.group:
    raise ValueError(f"untested={stop.untested} blocks are not whole groups of {located.group}")


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How the work is cut into programs.

  Lists that are read whole are of any lengths, so their hits are cut into chunks of equal size, whichever list they are
  of (`pallas_kernels.chunks`), a program for each. Misses are the work of `miss_programs`, few and first in line, so
  that PCIe is busy from the start without filling the SMs. A progressive list is one program's. A block is two loads,
  keys and values: with 5 stages two blocks are on their way while one is multiplied.
  """

  chunks: int  # at most
  miss_programs: int
  num_warps: int
  num_stages: int = 5

  @classmethod
  def of(cls, n_lists: int, n: int, block_bytes: int, has_slots: bool, progressive: bool) -> Tiling:
    """For `n_lists` = B x K lists of up to `n` blocks."""
    num_warps = min(8, max(2, block_bytes // WARP_BYTES))
    if progressive:  # each stop test needs all blocks before it
      return cls(n_lists, 0, num_warps)
    return cls(most_chunks(n_lists, n), min(MISS_PROGRAMS, n_lists) if has_slots else 0, num_warps)

  @property
  def programs(self) -> int:
    return self.miss_programs + self.chunks

  def parts(self, n_lists: int) -> int:
    """Partial results: one of each chunk, then one of each list's misses."""
    return self.chunks + (n_lists if self.miss_programs else 0)


class _Refs(NamedTuple):
  """What a kernel reads, and then what it writes. The last of both are one memory."""

  layer: Any  # [1]
  threshold: Any  # [1], of the stop test
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
  held: Any  # [P, 2, S, D]
  o: Any  # [parts, G, D]
  m: Any  # [parts, G]
  l: Any  # [parts, G]
  attended: Any  # [B, K]
  known: Any  # [B, K, G]
  slots: Any  # [P, 2, S, D]

  @property
  def n_lists(self) -> int:
    return self.length.shape[0] * self.length.shape[1]


class _Queue(NamedTuple):
  """What a kernel reads of free slots, and then what it writes; `place` is the one it reads, too."""

  slots: Any  # [Z, W]
  made: Any  # [Z]
  zone: Any  # [B] or [1]
  before: Any  # `taken`: one memory
  place: Any  # [B, K, n]
  taken: Any  # [Z]

  def take(self, of: _List, first, end, width: int):
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


class _Acc(NamedTuple):
  """A partial result, logarithms to base 2; query heads are padded to [heads]."""

  o: jax.Array  # [heads, D]
  m: jax.Array  # [heads]
  l: jax.Array  # [heads]
  group: jax.Array  # [heads], of the masses of a group: the log of the least, or the sum as `l` is one


class _List(NamedTuple):
  """A list as a program sees it."""

  b: jax.Array
  k: jax.Array
  queries: jax.Array  # [heads, D]


class _Program:
  """What the programs of all kernels do: loops over ranks [first, end) of a list, each acc -> acc.

  `rule` is that of the stop test, None without one.
  """

  def __init__(self, refs: _Refs, rule: StopRule | None = None):
    n_group, depth = refs.q.shape[2:]
    heads = max(triton.LEAST_TILE, pl.next_power_of_2(n_group))
    self.refs, self.layer, self.scale = refs, refs.layer[0], depth**-0.5
    self.of_head = jnp.minimum(jnp.arange(heads), n_group - 1)  # the last head stands in for those that pad
    self.least = rule is not None and rule.least
    self.sums = rule is not None and not self.least
    self.infinite = jnp.full((heads,), jnp.inf)
    self.zero = _Acc(jnp.zeros((heads, depth)), -self.infinite, jnp.zeros((heads,)), self.no_group())

  def no_group(self) -> jax.Array:
    """`_Acc.group` before the first block of a group."""
    return jnp.full(self.of_head.shape, jnp.inf if self.least else 0.0)

  def open(self, i: jax.Array) -> _List:
    """List `i` of B x K."""
    n_heads = self.refs.q.shape[1]
    b, k = jax.lax.div(i, n_heads), jax.lax.rem(i, n_heads)
    return _List(b, k, self.refs.q[b, k, self.of_head])

  def close(self, part: jax.Array, acc: _Acc) -> None:
    """Writes what is known of part of a list."""
    at = part, self.of_head
    self.refs.o[at], self.refs.m[at] = acc.o, acc.m * (1 / LOG2_E)
    self.refs.l[at] = acc.l

  def update(self, of: _List, acc: _Acc, keys, values, valid=None) -> _Acc:
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
    return _Acc(o, top, l * old + mass, group)

  def read_tail(self, of: _List, acc: _Acc, wanted: jax.Array | bool) -> _Acc:
    tail = self.refs.tail
    lane = jnp.minimum(self.refs.lanes[of.b], tail.shape[2] - 1)
    n, block_tokens = self.refs.tokens[of.b], tail.shape[4]

    def body(_, acc):
      keys, values = tail[of.k, self.layer, lane, 0], tail[of.k, self.layer, lane, 1]
      read = self.update(of, acc, keys, values, valid=jnp.arange(block_tokens) < n)
      return read._replace(group=acc.group)  # the tail is of no group

    return jax.lax.fori_loop(0, (wanted & (n > 0)).astype(jnp.int32), body, acc)

  def read_hits(self, of: _List, first, end, acc: _Acc) -> _Acc:
    slots = self.refs.slots

    def body(i, acc):
      at = self.refs.slot[of.b, of.k, i]
      return self.update(of, acc, slots[at, 0], slots[at, 1])

    return jax.lax.fori_loop(first, end, body, acc)

  def read_misses(self, of: _List, first, end, acc: _Acc, place=None) -> _Acc:
    """Copies the blocks to their places, too; `place` is a function of the rank if these are not the list's own."""
    pool, slots = self.refs.pool, self.refs.slots

    def body(i, acc):
      block, to = self.refs.blocks[of.b, of.k, i], place(i) if place else self.refs.place[of.b, of.k, i]

      def read(half):  # one half at a time takes fewer registers
        x = pool[of.k, self.layer, block, half]
        triton.store(slots.at[jnp.maximum(to, 0), jnp.int32(half)], x, mask=jnp.broadcast_to(to >= 0, x.shape))
        return x

      return self.update(of, acc, read(0), read(1))

    return jax.lax.fori_loop(first, end, body, acc)

  def read_pool(self, of: _List, first, end, acc: _Acc) -> _Acc:
    """Reads the blocks where there are no slots."""
    pool = self.refs.pool

    def body(i, acc):
      block = self.refs.blocks[of.b, of.k, i]
      return self.update(of, acc, pool[of.k, self.layer, block, 0], pool[of.k, self.layer, block, 1])

    return jax.lax.fori_loop(first, end, body, acc)


def _read_chunk(tiling: Tiling, program: _Program, chunk: jax.Array) -> None:
  refs, read = program.refs, program.read_hits if tiling.miss_programs else program.read_pool
  cut = Cut.of(refs.n_hits, refs.length, tiling.miss_programs > 0)
  i, part = cut.find(chunk)

  @pl.when(i < refs.n_lists)
  def _():
    of, first = program.open(i), part * cut.size
    end = jnp.minimum(first + cut.size, n_hits(refs.n_hits, refs.length, of.b, of.k, tiling.miss_programs > 0))
    program.close(chunk, read(of, first, end, program.read_tail(of, program.zero, part == 0)))


def _whole(tiling: Tiling, *refs) -> None:
  """Lists that are read whole: the first programs have all the misses, the others a chunk of the hits each."""
  refs = _Refs(*refs)
  program, me = _Program(refs), pl.program_id(0)
  if not tiling.miss_programs:
    return _read_chunk(tiling, program, me)

  @pl.when(me < tiling.miss_programs)
  def _():
    """The misses of every `miss_programs`-th list."""

    def body(j, _):
      i = me + j * tiling.miss_programs
      of = program.open(i)
      misses = refs.n_hits[of.b, of.k, 0], refs.length[of.b, of.k]
      program.close(tiling.chunks + i, program.read_misses(of, *misses, program.zero))

    left = refs.n_lists - me
    jax.lax.fori_loop(0, jax.lax.div(left + (tiling.miss_programs - 1), tiling.miss_programs), body, None)

  @pl.when(me >= tiling.miss_programs)
  def _():
    _read_chunk(tiling, program, me - tiling.miss_programs)


def _progressive(untested: int, rule: StopRule, group: int, has_slots: bool, *refs) -> None:
  """A list, group by group, with the stop test between. Its misses take slots if there are refs of a queue."""
  queue, n_read = None, _Refs._fields.index("o")
  if len(refs) > len(_Refs._fields):
    queue = _Queue(*refs[n_read : n_read + 4], *refs[-2:])
    refs = (*refs[:n_read], *refs[n_read + 4 : -2])
  refs = _Refs(*refs)
  program, stop = _Program(refs, rule), Stop(refs.threshold[0], untested, rule)
  of = program.open(pl.program_id(0))
  n, n_heads = refs.length[of.b, of.k], refs.q.shape[2]

  def body(state):
    i, _, known, o, m, l = state
    end, acc = jnp.minimum(i + group, n), _Acc(o, m, l, program.no_group())
    if has_slots:
      middle = jnp.minimum(i + refs.n_hits[of.b, of.k, jax.lax.div(i, group)], end)
      acc = program.read_hits(of, i, middle, acc)
      place = queue.take(of, middle, end, pl.next_power_of_2(group)) if queue else None
      acc = program.read_misses(of, middle, end, acc, place)
    else:
      acc = program.read_pool(of, i, end, acc)
    masses = acc.group if program.least else acc.m + (jnp.log2(acc.group) - math.log2(group))
    seen, left = acc.m + jnp.log2(acc.l), (n - end).astype(jnp.float32)
    enough, known = stop.after(known, masses, i, seen, left, n_heads)
    return end, jnp.where(enough, end, n), known, acc.o, acc.m, acc.l

  tail = program.read_tail(of, program.zero, True)
  start = jnp.int32(0), n, program.infinite, tail.o, tail.m, tail.l
  i, end, known, o, m, l = jax.lax.while_loop(lambda state: state[0] < state[1], body, start)
  program.close(pl.program_id(0), _Acc(o, m, l, program.no_group()))
  # Triton's compiler fails on a loop of which a result is not used (3.6: RemoveLayoutConversions).
  refs.attended[of.b, of.k], refs.known[of.b, of.k, program.of_head] = jnp.minimum(i, end), known


def _attend_kernel(implementation, q, tails, pool, slots, layer, located, taking) -> tuple[Any, ...]:
  """Also places and how many slots have been taken, if there are any to take."""
  (stop, free), (n_rows, n_heads, n_group, depth) = taking, q.shape
  n_lists, has_slots = n_rows * n_heads, slots.shape[0] > 0
  block_bytes = math.prod(pool.shape[3:]) * pool.dtype.itemsize
  tiling = Tiling.of(n_lists, located.blocks.shape[2], block_bytes, has_slots, stop is not None)
  if stop is not None:
    kernel = functools.partial(_progressive, stop.untested, stop.rule, located.group, has_slots)
  else:
    kernel = functools.partial(_whole, tiling)
  threshold = jnp.asarray(1.0 if stop is None else stop.threshold, jnp.float32)
  held = slots if has_slots else jnp.zeros((1, *slots.shape[1:]), slots.dtype)
  n_parts = tiling.parts(n_lists)

  def float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  fields, aliases, queue, taken = _Refs._fields, {}, (), ()
  if free is not None:
    zone = np.zeros(1, np.int32) if free.zone is None else free.zone
    queue, taken = (free.slots, free.made, zone, free.taken), (located.place, free.taken)
    aliases = {fields.index("place"): 6, fields.index("o") + 3: 7}
  o, m, l, attended, _, held, *taken = triton.call(
    kernel,
    out_shape=(
      float32(n_parts, n_group, depth),
      float32(n_parts, n_group),
      float32(n_parts, n_group),
      jax.ShapeDtypeStruct((n_rows, n_heads), jnp.int32),
      float32(n_rows, n_heads, n_group),
      *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (held, *taken)),
    ),
    grid=(tiling.programs,),
    input_output_aliases={fields.index("held"): 5} | aliases,
    implementation=implementation,
    num_warps=tiling.num_warps,
    num_stages=tiling.num_stages,
    name="attend",
  )(jnp.reshape(layer, 1), threshold.reshape(1), tails.lanes, tails.tokens, *located, q, tails.kv, pool, held, *queue)
  if stop is not None:
    partial = Partial(o.reshape(q.shape), m.reshape(q.shape[:3]), l.reshape(q.shape[:3]))
    return partial, attended, held if has_slots else slots, *taken
  partial = merge_chunks(Partial(o, m, l), q.shape, located.n_hits, located.length, tiling.chunks, implementation)
  return partial, located.length, held if has_slots else slots, *taken
