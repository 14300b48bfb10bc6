"""Which block is in which slot: `propose` and `find` look listed blocks up; when attention has read them, `commit`
makes it true.

Least recently used goes first, in the order that stood when the step began. A step is one jitted call that runs layers,
of a decode batch or of a piece of a prompt.

That order, `victims`, is one sort of the slots a step, not one a layer. Everything a step touches becomes younger than
everything it has not, so the order of what is untouched stays exact; what has been touched is passed over. Each call of
a step (its layers) goes on where the calls before it have come to, and gives a slot up once at most.

Lists that are read whole get slots for all their misses at once, by `propose`. Of lists that may stop anywhere, by
`find`, a miss takes a slot that is free (`pallas_kernels.free`) when it is read.

The blocks of a list are distinct. Two lists may have a block in common, where requests share it: each that misses it
gets a slot, the last one counts, and `maps.tidy` empties the others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int32

from pallas_kernels import triton
from pallas_kernels.maps import Maps, Victims, only, total, unused

CHUNK = 64  # ranks of a list that one program of a kernel looks at
LOOKS = 32  # places that a miss looks at for a slot; where nearly all are in use, a walk over them would take long


class Located(NamedTuple):
  """Blocks in the order in which attention reads them: group by group, and in a group those in slots first."""

  blocks: Int32[Array, "B K n"]  # -1: nothing
  slot: Int32[Array, "B K n"]  # where the block is; -1: a miss
  place: Int32[Array, "B K n"]  # the slot that a miss may go to; -1: it is read but not kept, or it is a hit
  n_hits: Int32[Array, "B K groups"]  # the first blocks of each group that are in their slots
  length: Int32[Array, "B K"]  # blocks of the list

  @property
  def group(self) -> int:
    """Blocks of a group: a power of two, of which the last group may have fewer, or the whole list."""
    n, groups = self.blocks.shape[-1], self.n_hits.shape[-1]
    return n if groups == 1 else pl.next_power_of_2(-(-n // groups))

  @property
  def hit(self) -> Bool[Array, "B K n"]:
    """Whether the block is in its slot."""
    return self.slot >= 0

  def missed(self, attended: Int32[Array, "B K"]) -> Int32[Array, "B K"]:
    """Of the first `attended` blocks, whole groups or all of them, those that are in no slot."""
    begun = jnp.arange(self.n_hits.shape[-1])[None, None] * self.group < attended[..., None]
    return attended - jnp.where(begun, self.n_hits, 0).sum(-1)

  @property
  def given(self) -> Int32[Array, "B K"]:
    """By how much a step's `given` grows when lists of one group have been read: the sum, in each zone."""
    return self.length - self.n_hits[..., 0]  # without a reduction over lists, which would be a kernel more a layer


def propose(
  maps: Maps,
  victims: Victims,
  layer: Int32[Array, ""] | int,
  blocks: Int32[Array, "B K n"],
  length: Int32[Array, "B K"],
  *,
  given: Int32[Array, "*any"] | int = 0,
  implementation: str = "xla",
) -> Located:
  """Where the blocks of lists are that are read whole, and slots for those that miss.

  Misses take turns, list by list, in each zone apart. Of m misses, the t-th looks at the places t, t + m, t + 2m ...
  from `given` on, LOOKS of them, and gets the first victim there that holds no block of the call and has not been used
  since the step began. A miss that finds none is read but not kept.

  So the slots that a call evicts are the least recently used ones, exactly, if no victim among them is passed over.
  Where one is, a younger slot goes in its stead.

  Args:
    maps: of one device.
    victims: made at the beginning of the step; with the zone of the lists, if there are several.
    layer: of the call.
    blocks: most critical first along n; -1: nothing. Beyond the end of a shorter list all are -1: hits
      change places, so that anything else there can come before the list's own blocks.
    length: blocks of each list; carried along.
    given: how many of the first victims the step has used: of each zone [Z]; with one zone, of any shape, the sum.
    implementation: "xla", "triton" or "interpret".

  Raises:
    ValueError: lists have no blocks, or it is not said which zone they are of.
  """
  cut = _Cut.of(blocks, None, implementation)
  if victims.zone is None and victims.slots.shape[0] > 1:
    raise ValueError(f"{victims.slots.shape[0]} zones, and the lists are of none")
  if maps.last_used.shape[0] == 0:
    return _nowhere(cut, blocks, length)
  given = jnp.asarray(given)
  if implementation == "xla":
    return _propose_xla(cut, maps, victims, layer, blocks, length, given)
  return _propose_kernels(cut, maps, victims, layer, blocks, length, given, implementation)


def find(
  maps: Maps,
  layer: Int32[Array, ""] | int,
  blocks: Int32[Array, "B K n"],
  length: Int32[Array, "B K"],
  *,
  group: int | None = None,
  implementation: str = "xla",
) -> Located:
  """Where the blocks of lists are that may stop anywhere. No miss has a place: it takes one when it is read.

  Args:
    maps: of one device.
    layer: of the call.
    blocks: as those of `propose`.
    length: blocks of each list; carried along.
    group: blocks that may change places, so that hits come first; a power of two, or None for the whole list.
    implementation: "xla", "triton" or "interpret".

  Raises:
    ValueError: `group` is not a power of two, or lists have no blocks.
  """
  cut = _Cut.of(blocks, group, implementation)
  if maps.last_used.shape[0] == 0:
    return _nowhere(cut, blocks, length)
  if implementation == "xla":
    return _hits_first_xla(cut, blocks, _look_up_xla(maps, layer, blocks), jnp.full_like(blocks, -1), length)
  of_list, of_group = cut.results
  found = cut.call(
    functools.partial(_find, cut), implementation, out_shape=(of_list, of_list, of_list, of_group), name="find"
  )
  return Located(*found(jnp.reshape(layer, 1).astype(jnp.int32), blocks, maps.slot_of), length=length)


@dataclasses.dataclass(frozen=True)
class _Cut:
  """Lists [B, K, n] in groups. A kernel's program has `chunk` ranks of a list: groups, or one group."""

  n_rows: int
  n_heads: int
  n: int
  group: int

  @classmethod
  def of(cls, blocks: jax.Array, group: int | None, implementation: str) -> _Cut:
    """Raises ValueError if `group` is not a power of two, or lists have no blocks."""
    triton.check(implementation)
    n_rows, n_heads, n = blocks.shape
    if n == 0:
      raise ValueError("lists of 0 blocks")
    group = n if group is None else min(group, n)
    if group < 1 or (group != n and group & (group - 1)):
      raise ValueError(f"{group=} is not a power of two")
    return cls(n_rows, n_heads, n, group)

  @property
  def n_lists(self) -> int:
    return self.n_rows * self.n_heads

  @property
  def n_groups(self) -> int:
    return -(-self.n // self.group)

  @property
  def chunk(self) -> int:
    return pl.next_power_of_2(self.n) if self.n_groups == 1 else max(CHUNK, self.group)

  @property
  def width(self) -> int:
    """Ranks of a group in a program, those beyond the list's end counted."""
    return self.chunk if self.n_groups == 1 else self.group

  @property
  def groups_of_chunk(self) -> int:
    return self.chunk // self.width

  @property
  def results(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What a kernel writes of every rank, and of every group."""
    shapes = (self.n_rows, self.n_heads, self.n), (self.n_rows, self.n_heads, self.n_groups)
    return jax.ShapeDtypeStruct(shapes[0], jnp.int32), jax.ShapeDtypeStruct(shapes[1], jnp.int32)

  def call(self, kernel, implementation: str, **options):
    """One program for each chunk of ranks and list."""
    grid, num_warps = (-(-self.n // self.chunk), self.n_lists), 1 if self.chunk <= 64 else 4
    return triton.call(kernel, grid=grid, implementation=implementation, num_warps=num_warps, **options)


def _nowhere(cut: _Cut, blocks, length) -> Located:
  """Where there are no slots."""
  nowhere = jnp.full_like(blocks, -1)
  return Located(blocks, nowhere, nowhere, jnp.zeros((*blocks.shape[:2], cut.n_groups), jnp.int32), length)


# ------------------------------------------------------------------------------------------------------------------ XLA


def _look_up_xla(maps, layer, blocks) -> jax.Array:
  return jnp.where(blocks >= 0, maps.slot_of[jnp.arange(blocks.shape[1])[None, :, None], layer, blocks], -1)


def _propose_xla(cut: _Cut, maps, victims, layer, blocks, length, given) -> Located:
  (n_zones, of_zone), n_slots = victims.slots.shape, maps.last_used.shape[0]
  slot = _look_up_xla(maps, layer, blocks)
  hit = slot >= 0
  claimed = jnp.zeros(n_slots, jnp.int8).at[only(hit, slot, n_slots)].set(1, mode="drop")
  miss = (blocks >= 0) & ~hit
  zone = jnp.zeros(1, jnp.int32) if victims.zone is None else victims.zone
  given = given.sum()[None] if n_zones == 1 else given[zone]
  queues = miss.reshape(zone.size, -1)  # lists of one zone follow each other
  index = (given[:, None] + jnp.cumsum(queues, 1) - 1).reshape(miss.shape)
  stride = jnp.broadcast_to(queues.sum(1)[:, None], queues.shape).reshape(miss.shape)
  zone = jnp.reshape(zone, (-1, 1, 1))

  def look_further(state):
    look, index, place, wanting = state
    victim = victims.slots.at[zone, only(wanting, index, of_zone)].get(mode="fill", fill_value=-1)
    found = (victim >= 0) & unused(maps.last_used[victim], victims.since) & (claimed[victim] == 0)
    index += stride
    return look + 1, index, jnp.where(found, victim, place), wanting & ~found & (index < of_zone)

  def more(state):
    look, _, _, wanting = state
    return (look < LOOKS) & wanting.any()

  start = jnp.int32(0), index, jnp.full_like(index, -1), miss
  place = jax.lax.while_loop(more, look_further, start)[2]
  return _hits_first_xla(cut, blocks, slot, place, length)


def _hits_first_xla(cut: _Cut, blocks, slot, place, length) -> Located:
  def by_group(x, fill):
    """[B, K, n] -> [B, K, groups, group]."""
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, -cut.n % cut.group)), constant_values=fill)
    return padded.reshape(cut.n_rows, cut.n_heads, cut.n_groups, cut.group)

  def by_list(x):
    return x.reshape(cut.n_rows, cut.n_heads, -1)[..., : cut.n]

  hits = by_group(slot >= 0, False)
  order = jnp.argsort(~hits, axis=-1, stable=True)
  blocks, slot, place = (by_list(jnp.take_along_axis(by_group(x, -1), order, -1)) for x in (blocks, slot, place))
  return Located(blocks, slot, place, hits.sum(-1, dtype=jnp.int32), length)


# -------------------------------------------------------------------------------------------------------------- kernels


def _propose_kernels(cut: _Cut, maps, victims, layer, blocks, length, given, implementation) -> Located:
  """Two kernels of one program for each list: the second needs the misses of all lists."""
  n_slots, layer = maps.last_used.shape[0], jnp.reshape(layer, 1).astype(jnp.int32)
  unclaimed = jnp.zeros(-(-n_slots // 128) * 128, jnp.int8)  # of whole words: see experiments/LOG.md, 2026-11-28
  of_list, of_group = cut.results
  slot, misses, claimed = cut.call(
    functools.partial(_look_up, cut),
    implementation,
    out_shape=(
      of_list,
      jax.ShapeDtypeStruct((cut.n_lists,), jnp.int32),
      jax.ShapeDtypeStruct(unclaimed.shape, jnp.int8),
    ),
    input_output_aliases={3: 2},
    name="look_up",
  )(layer, blocks, maps.slot_of, unclaimed)
  zone = () if victims.slots.shape[0] == 1 else (victims.zone,)
  out_shape = of_list, of_list, of_list, of_group
  assign = cut.call(functools.partial(_assign, cut), implementation, out_shape=out_shape, name="assign")
  since = jnp.reshape(victims.since, 1)
  out = assign(blocks, slot, given.ravel(), since, misses, victims.slots, maps.last_used, claimed, *zone)
  return Located(*out, length=length)


def _ranks(cut: _Cut):
  """Of a program: chunk, list, row, head, and the ranks [chunk], which may lie beyond the list's end."""
  c, i = pl.program_id(0), pl.program_id(1)
  return c, i, jax.lax.div(i, cut.n_heads), jax.lax.rem(i, cut.n_heads), c * cut.chunk + jnp.arange(cut.chunk)


def _slots(cut: _Cut, layer_ref, blocks_ref, slot_of_ref, b, k, rank):
  """Blocks and slots [chunk] of a program, -1 beyond the list's end."""
  block = jnp.where(rank < cut.n, blocks_ref[b, k, jnp.minimum(rank, cut.n - 1)], -1)
  return block, jnp.where(block >= 0, slot_of_ref[k, layer_ref[0], jnp.maximum(block, 0)], -1)


def _find(
  cut: _Cut,
  layer_ref,  # [1]
  blocks_ref,  # [B, K, n]
  slot_of_ref,  # [K, L, M]
  *out_refs,
):
  """Lists of several groups, which take slots as they are read."""
  _, _, b, k, rank = _ranks(cut)
  block, slot = _slots(cut, layer_ref, blocks_ref, slot_of_ref, b, k, rank)
  _write_hits_first(cut, block, slot, jnp.full((cut.chunk,), -1, jnp.int32), out_refs)


def _look_up(
  cut: _Cut,
  layer_ref,  # [1]
  blocks_ref,  # [B, K, n]
  slot_of_ref,  # [K, L, M]
  _,  # claimed_ref: one memory
  slot_ref,  # [B, K, n]
  misses_ref,  # [B * K]
  claimed_ref,  # [P or more], 1 where a slot holds a block of the call
):
  _, i, b, k, rank = _ranks(cut)
  block, slot = _slots(cut, layer_ref, blocks_ref, slot_of_ref, b, k, rank)
  hit, n_slots = slot >= 0, claimed_ref.shape[0]
  triton.store(slot_ref.at[b, k, rank], slot, mask=rank < cut.n)
  triton.store(claimed_ref.at[only(hit, slot, n_slots)], jnp.ones((cut.chunk,), jnp.int8), mask=hit)
  misses_ref[i] = jnp.sum(((block >= 0) & ~hit).astype(jnp.int32))


def _assign(
  cut: _Cut,
  blocks_ref,  # [B, K, n]
  slot_ref,  # [B, K, n]
  given_ref,  # [Z], or any count where Z = 1
  since_ref,  # [1]
  misses_ref,  # [B * K]
  victims_ref,  # [Z, P / Z]
  last_used_ref,  # [P]
  claimed_ref,  # [P or more]
  *refs,  # the zone [B] or [1] where Z > 1; results
):
  """Lists of one group: every miss looks at places of its own."""
  zone_ref, out_refs = (None, refs) if victims_ref.shape[0] == 1 else (refs[0], refs[1:])
  _, i, b, k, rank = _ranks(cut)
  exists, at = rank < cut.n, jnp.minimum(rank, cut.n - 1)
  block, slot = (jnp.where(exists, ref[b, k, at], -1) for ref in (blocks_ref, slot_ref))
  miss, of_zone = ((block >= 0) & (slot < 0)).astype(jnp.int32), victims_ref.shape[1]
  if zone_ref is None:
    zone, given = 0, total(given_ref)
  else:
    zone = zone_ref[b if zone_ref.shape[0] > 1 else 0]
    given = given_ref[zone]
  if zone_ref is None or zone_ref.shape[0] == 1:
    before, stride = total(misses_ref, lambda other: other < i), total(misses_ref)
  else:  # of the row's lists
    first = b * cut.n_heads
    before = total(misses_ref, lambda other: (first <= other) & (other < i))
    stride = total(misses_ref, lambda other: (first <= other) & (other < first + cut.n_heads))

  def look_further(state):
    look, index, place, wanting = state
    wanting = (wanting == 1) & (index < of_zone)
    victim = victims_ref[zone, jnp.where(wanting, index, 0)]
    free = unused(last_used_ref[victim], since_ref[0]) & (claimed_ref[victim].astype(jnp.int32) == 0)
    place = jnp.where(wanting & free, victim, place)
    return look + 1, index + stride, place, (wanting & ~free).astype(jnp.int32)

  def more(state):
    look, _, _, wanting = state
    return (look < LOOKS) & (jnp.max(wanting) > 0)

  nowhere = jnp.full((cut.chunk,), -1, jnp.int32)
  start = jnp.int32(0), given + before + jnp.cumsum(miss) - 1, nowhere, miss
  look, index, place, wanting = jax.lax.while_loop(more, look_further, start)
  # Never so, but every result of a loop must be used: Triton's compiler fails otherwise.
  place = jnp.where((wanting == 1) & (index < 0) & (look < 0), -1, place)
  _write_hits_first(cut, block, slot, place, out_refs)


def _write_hits_first(cut: _Cut, block, slot, place, out_refs):
  """A program's blocks, slots and places [chunk], of each group the hits first, and the hits of each group."""
  c, _, b, k, rank = _ranks(cut)
  exists, groups, width = rank < cut.n, cut.groups_of_chunk, cut.width
  blocks_ref, slot_ref, place_ref, hits_ref = out_refs
  hit = jnp.reshape((slot >= 0).astype(jnp.int32), (groups, width))
  hits, before = jnp.sum(hit, 1), jnp.cumsum(hit, 1)  # of a group, and up to and with each
  to = jnp.arange(width)[None]
  to = jnp.where(hit == 1, before - 1, hits[:, None] + to - before)
  to = c * cut.chunk + jnp.reshape(jnp.arange(groups)[:, None] * width + to, (cut.chunk,))
  triton.store(blocks_ref.at[b, k, to], block, mask=exists)
  triton.store(slot_ref.at[b, k, to], slot, mask=exists)
  triton.store(place_ref.at[b, k, to], place, mask=exists)
  of_group = c * groups + jnp.arange(groups)
  triton.store(hits_ref.at[b, k, of_group], hits, mask=of_group < cut.n_groups)
