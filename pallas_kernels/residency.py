"""Which block is in which slot: `propose` looks listed blocks up and finds slots for those that miss; when attention
has read them, `commit` makes it true.

Least recently used goes first, in the order that stood when the step began. A step is one jitted call that runs layers,
of a decode batch or of a piece of a prompt.

That order, `victims`, is one sort of the slots a step, not one a layer. Everything a step touches becomes younger than
everything it has not, so the order of what is untouched stays exact; what has been touched is passed over. Each call of
a step (its layers) goes on where the calls before it have come to, and gives a slot up once at most.

The blocks of one call are distinct. `layer` and `stamp` are scalars, or [n], one for each rank of the list.
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
from pallas_kernels.maps import Maps, Victims, by_rank, only, unused

CHUNK = 64  # ranks of a list that one program of a kernel looks at
LEFT_CHUNK = 1024  # places that one program looks at for slots that are left
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

  def given(self, attended: Int32[Array, "B K"]) -> Int32[Array, "B K"]:
    """By how much a step's `given` grows when the first `attended` blocks were read: the sum of what is returned.

    The misses of the groups that every list has read whole; a list that ended before a group has read it. All places
    up to there are used. Those of later groups may be, and the next call looks which.
    """
    if self.n_hits.shape[-1] == 1:
      return self.length - self.n_hits[..., 0]  # without a reduction over lists, which would be a kernel more a layer
    never = jnp.iinfo(jnp.int32).max
    read_by_all = jnp.where(attended < self.length, attended, never).min()  # of lists that stopped early
    first = jnp.arange(self.n_hits.shape[-1])[None, None] * self.group
    missed = jnp.clip(self.length[..., None] - first, 0, self.group) - self.n_hits
    whole = first <= read_by_all - self.group
    return jnp.where(whole, missed, 0).sum(-1, dtype=jnp.int32)


def propose(
  maps: Maps,
  victims: Victims,
  layer: Int32[Array, ""] | Int32[Array, " n"] | int,
  blocks: Int32[Array, "B K n"],
  length: Int32[Array, "B K"],
  *,
  given: Int32[Array, "*any"] | int = 0,
  group: int | None = None,
  implementation: str = "xla",
) -> Located:
  """Where the listed blocks are, and slots for those that miss.

  Misses take turns: those of the first group of every list, list by list, then those of the second group, and so on.
  A victim that holds a block of the call, or has been used since the step began, is passed over. A miss that finds no
  slot is read but not kept.

  Lists of several groups, which may end early: the t-th miss gets the t-th victim that is left from `given` on, among
  as many places as the lists have entries. Lists of one group: of m misses, the t-th looks at the places t, t + m,
  t + 2m ... from `given` on, LOOKS of them, and gets the first victim that is left there.

  So the slots that a call evicts are the least recently used ones, exactly, if all its misses are read and no victim
  among them is passed over. Where one is, in lists of one group, a younger slot goes in its stead. Where a progressive
  list stops early its slots stay as they are, and the next call gives them away before any other; those of the last
  call stay older than what was evicted.

  Args:
    maps: of one device.
    victims: made at the beginning of the step.
    layer: of the call, or of each rank.
    blocks: most critical first along n; -1: nothing. Beyond the end of a shorter list all are -1: hits
      change places, so that anything else there can come before the list's own blocks.
    length: blocks of each list; carried along.
    given: of any shape; its sum is how many of the first victims the step has used, by `Located.given`.
    group: blocks that may change places, so that hits come first; a power of two, or None for the whole list.
    implementation: "xla", "triton" or "interpret".

  Raises:
    ValueError: `group` is not a power of two, or lists have no blocks.
  """
  triton.check(implementation)
  n_rows, n_heads, n = blocks.shape
  if n == 0:
    raise ValueError("lists of 0 blocks")
  group = n if group is None else min(group, n)
  if group < 1 or (group != n and group & (group - 1)):
    raise ValueError(f"{group=} is not a power of two")
  cut = _Cut(n_rows, n_heads, n, group)
  if maps.last_used.shape[0] == 0:
    nowhere = jnp.full_like(blocks, -1)
    return Located(blocks, nowhere, nowhere, jnp.zeros((*blocks.shape[:2], cut.n_groups), jnp.int32), length)
  given = jnp.asarray(given)
  if implementation == "xla":
    return _propose_xla(cut, maps, victims, layer, blocks, length, given)
  return _propose_kernels(cut, maps, victims, layer, blocks, length, given, implementation)


@dataclasses.dataclass(frozen=True)
class _Cut:
  """Lists [B, K, n] in groups. A kernel's program has `chunk` ranks of a list: groups, or one group."""

  n_rows: int
  n_heads: int
  n: int
  group: int

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
  def n_chunks(self) -> int:
    return -(-self.n // self.chunk)

  @property
  def width(self) -> int:
    """Ranks of a group in a program, those beyond the list's end counted."""
    return self.chunk if self.n_groups == 1 else self.group

  @property
  def groups_of_chunk(self) -> int:
    return self.chunk // self.width


def _left(cut: _Cut, maps: Maps, victims: Victims, claimed: jax.Array, given: jax.Array) -> jax.Array:
  """The victims that are left from `given` on, in order, among as many places as lists have entries; then -1."""
  n_slots = maps.last_used.shape[0]
  n = min(n_slots, cut.n_lists * cut.n)
  slots = victims.slots.at[given.sum() + jnp.arange(n)].get(mode="fill", fill_value=-1)
  left = (slots >= 0) & unused(maps.last_used[slots], victims.since) & (claimed[slots] == 0)
  at = only(left, jnp.cumsum(left.astype(jnp.int32)) - 1, n)
  return jnp.full(n, -1, jnp.int32).at[at].set(slots, mode="drop")


# ------------------------------------------------------------------------------------------------------------------ XLA


def _propose_xla(cut: _Cut, maps, victims, layer, blocks, length, given) -> Located:
  n_slots = maps.last_used.shape[0]
  k = jnp.arange(cut.n_heads)[None, :, None]
  slot = jnp.where(blocks >= 0, maps.slot_of[k, by_rank(layer), blocks], -1)
  hit = slot >= 0
  claimed = jnp.zeros(n_slots, jnp.int8).at[only(hit, slot, n_slots)].set(1, mode="drop")
  miss = (blocks >= 0) & ~hit

  def by_group(x, fill):
    """[B, K, n] -> [B, K, groups, group]."""
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, -cut.n % cut.group)), constant_values=fill)
    return padded.reshape(cut.n_rows, cut.n_heads, cut.n_groups, cut.group)

  def by_list(x):
    return x.reshape(cut.n_rows, cut.n_heads, -1)[..., : cut.n]

  in_turn = jnp.moveaxis(by_group(miss, False), 2, 0)  # [groups, B, K, group]
  turn = (jnp.cumsum(in_turn.ravel()) - 1).reshape(in_turn.shape)
  turn = by_list(jnp.moveaxis(turn, 0, 2))
  if cut.n_groups == 1:
    place = _look_xla(maps, victims, claimed, given.sum() + turn, miss)
  else:
    left = _left(cut, maps, victims, claimed, given)
    place = left.at[only(miss, turn, n_slots)].get(mode="fill", fill_value=-1)

  hits = by_group(hit, False)
  order = jnp.argsort(~hits, axis=-1, stable=True)
  blocks, slot, place = (by_list(jnp.take_along_axis(by_group(x, -1), order, -1)) for x in (blocks, slot, place))
  return Located(blocks, slot, place, hits.sum(-1, dtype=jnp.int32), length)


def _look_xla(maps, victims, claimed, index, miss) -> jax.Array:
  """Slots for the misses of lists of one group; `index` is the place that each looks at first."""
  n_slots, stride = maps.last_used.shape[0], miss.sum()

  def look_further(state):
    look, index, place, wanting = state
    victim = victims.slots.at[only(wanting, index, n_slots)].get(mode="fill", fill_value=-1)
    found = (victim >= 0) & unused(maps.last_used[victim], victims.since) & (claimed[victim] == 0)
    index += stride
    return look + 1, index, jnp.where(found, victim, place), wanting & ~found & (index < n_slots)

  def more(state):
    look, _, _, wanting = state
    return (look < LOOKS) & wanting.any()

  nowhere = jnp.full_like(index, -1)
  return jax.lax.while_loop(more, look_further, (jnp.int32(0), index, nowhere, miss))[2]


# -------------------------------------------------------------------------------------------------------------- kernels


def _propose_kernels(cut: _Cut, maps, victims, layer, blocks, length, given, implementation) -> Located:
  """Two kernels of one program for each list and chunk of ranks: the second needs the misses of all lists.

  Between them, lists of several groups need two small ones.
  """
  n_slots, layer = maps.last_used.shape[0], jnp.reshape(layer, -1).astype(jnp.int32)
  unclaimed = jnp.zeros(-(-n_slots // 128) * 128, jnp.int8)  # of whole words: see experiments/LOG.md, 2026-11-28
  call = functools.partial(
    triton.call,
    grid=(cut.n_chunks, cut.n_lists),
    implementation=implementation,
    num_warps=1 if cut.chunk <= 64 else 4,
  )
  of_list = jax.ShapeDtypeStruct(blocks.shape, jnp.int32)
  of_group = jax.ShapeDtypeStruct((*blocks.shape[:2], cut.n_groups), jnp.int32)
  counts = jax.ShapeDtypeStruct((cut.n_chunks * cut.groups_of_chunk, cut.n_lists), jnp.int32)
  slot, misses, claimed = call(
    functools.partial(_look_up, cut),
    out_shape=(of_list, counts, jax.ShapeDtypeStruct(unclaimed.shape, jnp.int8)),
    input_output_aliases={3: 2},
    name="look_up",
  )(layer, blocks, maps.slot_of, unclaimed)

  if cut.n_groups == 1:
    since = jnp.reshape(victims.since, 1)
    kernel = _assign
    operands = given.ravel(), since, misses.ravel(), victims.slots, maps.last_used, claimed
  else:
    kernel = _assign_left
    operands = _queues(cut, maps, victims, claimed, given, misses, implementation)
  out = call(functools.partial(kernel, cut), out_shape=(of_list, of_list, of_list, of_group), name="assign")
  return Located(*out(blocks, slot, *operands), length=length)


def _queues(cut: _Cut, maps, victims, claimed, given, misses, implementation):
  """What misses of lists of several groups take turns by: two kernels, the second needs the counts of all chunks.

  Returns:
    The victims that are left as `_left` makes them, but that those beyond their count or the misses' are anything;
    the count of each chunk of places; for each group and list the misses of the lists before it, and the misses of
    each group.
  """
  n, n_groups = min(victims.slots.shape[0], cut.n_lists * cut.n), misses.shape[0]
  n_chunks = -(-n // LEFT_CHUNK)

  def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  places = given.ravel(), jnp.reshape(victims.since, 1), victims.slots, maps.last_used, claimed
  counts, before, totals = triton.call(
    functools.partial(_count, n, n_chunks),
    out_shape=(int32(n_chunks), int32(n_groups, cut.n_lists), int32(n_groups)),
    grid=(n_chunks + n_groups,),
    implementation=implementation,
    name="count_left",
  )(*places, misses)
  left = triton.call(
    functools.partial(_compact, n),
    out_shape=int32(n),
    grid=(n_chunks,),
    implementation=implementation,
    name="compact_left",
  )(*places, counts, totals)
  return left, counts, before, totals


def _ranks(cut: _Cut):
  """Of a program: chunk, list, row, head, and the ranks [chunk], which may lie beyond the list's end."""
  c, i = pl.program_id(0), pl.program_id(1)
  return c, i, jax.lax.div(i, cut.n_heads), jax.lax.rem(i, cut.n_heads), c * cut.chunk + jnp.arange(cut.chunk)


def _look_up(
  cut: _Cut,
  layer_ref,  # [1] or [n]
  blocks_ref,  # [B, K, n]
  slot_of_ref,  # [K, L, M]
  _,  # claimed_ref: one memory
  slot_ref,  # [B, K, n]
  misses_ref,  # [groups, B * K], groups padded to whole chunks
  claimed_ref,  # [P or more], 1 where a slot holds a block of the call
):
  c, i, b, k, rank = _ranks(cut)
  exists, at = rank < cut.n, jnp.minimum(rank, cut.n - 1)
  block = jnp.where(exists, blocks_ref[b, k, at], -1)
  of_layer = layer_ref[0] if layer_ref.shape[0] == 1 else layer_ref[at]
  slot = jnp.where(block >= 0, slot_of_ref[k, of_layer, jnp.maximum(block, 0)], -1)
  hit, n_slots = slot >= 0, claimed_ref.shape[0]
  triton.store(slot_ref.at[b, k, rank], slot, mask=exists)
  triton.store(claimed_ref.at[only(hit, slot, n_slots)], jnp.ones((cut.chunk,), jnp.int8), mask=hit)
  miss = ((block >= 0) & ~hit).astype(jnp.int32)
  if cut.groups_of_chunk == 1:
    misses_ref[c, i] = jnp.sum(miss)
  else:
    of_group = c * cut.groups_of_chunk + jnp.arange(cut.groups_of_chunk)
    misses_ref[of_group, i] = jnp.sum(jnp.reshape(miss, (cut.groups_of_chunk, cut.width)), 1)


def _assign(
  cut: _Cut,
  blocks_ref,  # [B, K, n]
  slot_ref,  # [B, K, n]
  given_ref,  # any count
  since_ref,  # [1]
  misses_ref,  # [B * K]
  victims_ref,  # [P]
  last_used_ref,  # [P]
  claimed_ref,  # [P or more]
  *out_refs,
):
  """Lists of one group: every miss looks at places of its own."""
  _, i, b, k, rank = _ranks(cut)
  block, slot, miss = _list(cut, blocks_ref, slot_ref, b, k, rank)
  n_slots = victims_ref.shape[0]
  before = _total(given_ref) + _total(misses_ref, lambda other: other < i)
  stride = _total(misses_ref)

  def look_further(state):
    look, index, place, wanting = state
    wanting = (wanting == 1) & (index < n_slots)
    victim = victims_ref[jnp.where(wanting, index, 0)]
    free = unused(last_used_ref[victim], since_ref[0]) & (claimed_ref[victim].astype(jnp.int32) == 0)
    place = jnp.where(wanting & free, victim, place)
    return look + 1, index + stride, place, (wanting & ~free).astype(jnp.int32)

  def more(state):
    look, _, _, wanting = state
    return (look < LOOKS) & (jnp.max(wanting) > 0)

  nowhere = jnp.full((cut.chunk,), -1, jnp.int32)
  start = jnp.int32(0), before + jnp.cumsum(miss) - 1, nowhere, miss
  look, index, place, wanting = jax.lax.while_loop(more, look_further, start)
  # Never so, but every result of a loop must be used: Triton's compiler fails otherwise.
  place = jnp.where((wanting == 1) & (index < 0) & (look < 0), -1, place)
  _write_hits_first(cut, block, slot, place, out_refs)


def _places_left(n: int, chunk, given_ref, since_ref, victims_ref, last_used_ref, claimed_ref):
  """The slots of a chunk of places, of the first `n` after those given, and int32, 1 where one is left."""
  place = chunk * LEFT_CHUNK + jnp.arange(LEFT_CHUNK)
  at, n_slots = _total(given_ref) + place, victims_ref.shape[0]
  exists = (place < n) & (at < n_slots)
  slot = victims_ref[jnp.minimum(at, n_slots - 1)]
  free = unused(last_used_ref[slot], since_ref[0]) & (claimed_ref[slot].astype(jnp.int32) == 0)
  return slot, (exists & free).astype(jnp.int32)


def _count(
  n: int,
  n_chunks: int,
  given_ref,  # any count
  since_ref,  # [1]
  victims_ref,  # [P]
  last_used_ref,  # [P]
  claimed_ref,  # [P or more]
  misses_ref,  # [groups, B * K]
  counts_ref,  # [chunks], places that are left in each
  before_ref,  # [groups, B * K], misses of the lists before
  totals_ref,  # [groups], misses
):
  """A program counts a chunk of places, or the misses of a group."""
  i = pl.program_id(0)

  @pl.when(i < n_chunks)
  def _():
    _, left = _places_left(n, i, given_ref, since_ref, victims_ref, last_used_ref, claimed_ref)
    counts_ref[i] = jnp.sum(left)

  @pl.when(i >= n_chunks)
  def _():
    group, n_lists = i - n_chunks, misses_ref.shape[1]
    at = jnp.arange(pl.next_power_of_2(n_lists))
    exists = at < n_lists
    misses = jnp.where(exists, misses_ref[group, jnp.minimum(at, n_lists - 1)], 0)
    triton.store(before_ref.at[group, at], jnp.cumsum(misses) - misses, mask=exists)
    totals_ref[group] = jnp.sum(misses)


def _compact(
  n: int,
  given_ref,  # any count
  since_ref,  # [1]
  victims_ref,  # [P]
  last_used_ref,  # [P]
  claimed_ref,  # [P or more]
  counts_ref,  # [chunks]
  totals_ref,  # [groups], misses
  left_ref,  # [n], the slots that are left, in order
):
  i = pl.program_id(0)
  before = _total(counts_ref, lambda other: other < i)

  @pl.when(before < _total(totals_ref))  # no miss comes to the others
  def _():
    slot, left = _places_left(n, i, given_ref, since_ref, victims_ref, last_used_ref, claimed_ref)
    to = before + jnp.cumsum(left) - 1
    triton.store(left_ref.at[only(left == 1, to, n)], slot, mask=left == 1)


def _assign_left(
  cut: _Cut,
  blocks_ref,  # [B, K, n]
  slot_ref,  # [B, K, n]
  left_ref,  # victims that are left
  counts_ref,  # [chunks], how many there are
  before_ref,  # [groups, B * K], misses of the lists before
  totals_ref,  # [groups], misses of all lists
  *out_refs,
):
  """Lists of several groups: the t-th miss of all gets the t-th victim that is left."""
  c, i, b, k, rank = _ranks(cut)
  block, slot, miss = _list(cut, blocks_ref, slot_ref, b, k, rank)
  groups = cut.groups_of_chunk
  of_chunk = c * groups + jnp.arange(groups)
  totals, before = totals_ref[of_chunk], before_ref[of_chunk, i]
  earlier = _total(totals_ref, lambda other: other < c * groups) + jnp.cumsum(totals) - totals + before
  turn = earlier[:, None] + jnp.cumsum(jnp.reshape(miss, (groups, cut.width)), 1) - 1
  turn = jnp.reshape(turn, (cut.chunk,))
  finds = (miss == 1) & (turn < _total(counts_ref))
  place = jnp.where(finds, left_ref[jnp.where(finds, turn, 0)], -1)
  _write_hits_first(cut, block, slot, place, out_refs)


def _list(cut: _Cut, blocks_ref, slot_ref, b, k, rank):
  """Blocks and slots [chunk] of a program, -1 beyond the list's end, and int32, 1 where a block misses."""
  exists, rank = rank < cut.n, jnp.minimum(rank, cut.n - 1)
  block, slot = (jnp.where(exists, ref[b, k, rank], -1) for ref in (blocks_ref, slot_ref))
  return block, slot, ((block >= 0) & (slot < 0)).astype(jnp.int32)


def _total(ref, wanted=None) -> jax.Array:
  """The sum of the values [n] of a ref, or of those whose index is `wanted`."""
  n = ref.shape[0]
  i = jnp.arange(pl.next_power_of_2(n))
  return jnp.sum(jnp.where((i < n) if wanted is None else wanted(i), ref[jnp.minimum(i, n - 1)], 0))


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
