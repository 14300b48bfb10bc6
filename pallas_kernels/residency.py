"""Which block is in which slot: `propose` looks listed blocks up and finds slots for those that miss, `commit` makes
true what attention then did. Least recently used goes first, in the order that stood when the step began. A step is one
jitted call that runs layers, of a decode batch or of a piece of a prompt.

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

from pallas_kernels import triton
from pallas_kernels.maps import Maps, Victims, unused

CHUNK = 64  # ranks of a list that one program of a kernel looks at
LOOKS = 32  # places that a miss looks at for a slot; where nearly all are in use, a walk over them would take long


class Located(NamedTuple):
  """Blocks in the order in which attention reads them: group by group, and in a group those in slots first."""

  blocks: jax.Array  # [B, K, n] int32, -1: nothing
  slot: jax.Array  # [B, K, n] int32, where the block is; -1: a miss
  place: jax.Array  # [B, K, n] int32, the slot that a miss may go to; -1: it is read but not kept, or it is a hit
  n_hits: jax.Array  # [B, K, n / group] int32, the first blocks of each group that are in their slots
  length: jax.Array  # [B, K] int32, blocks of the list

  @property
  def group(self) -> int:
    """Blocks of a group: a power of two, of which the last group may have fewer, or the whole list."""
    n, groups = self.blocks.shape[-1], self.n_hits.shape[-1]
    return n if groups == 1 else pl.next_power_of_2(-(-n // groups))

  @property
  def hit(self) -> jax.Array:
    """[B, K, n] bool: whether the block is in its slot."""
    return self.slot >= 0

  def missed(self, attended: jax.Array) -> jax.Array:
    """Of the first `attended` [B, K] blocks, whole groups or all of them, those that are in no slot: [B, K] int32."""
    begun = jnp.arange(self.n_hits.shape[-1])[None, None] * self.group < attended[..., None]
    return attended - jnp.where(begun, self.n_hits, 0).sum(-1)

  def given(self, attended: jax.Array) -> jax.Array:
    """By how much a step's `given` grows when the first `attended` [B, K] blocks were read: the sum of [B, K] int32.

    The misses of the groups that every list has read whole; a list that ended before a group has read it. All places
    up to there are used. Those of later groups may be, and the next call looks which.
    """
    if self.n_hits.shape[-1] == 1:
      return self.length - self.n_hits[..., 0]  # without a reduction over lists, which would be a kernel more a layer
    first = jnp.arange(self.n_hits.shape[-1])[None, None] * self.group
    length = self.length[..., None]
    whole = (attended[..., None] >= jnp.minimum(first + self.group, length)).all((0, 1), keepdims=True)  # [n / group]
    missed = jnp.clip(length - first, 0, self.group) - self.n_hits
    return jnp.where(whole, missed, 0).sum(-1, dtype=jnp.int32)


def propose(
  maps: Maps,
  victims: Victims,
  layer: jax.Array,
  blocks: jax.Array,
  length: jax.Array,
  *,
  given: jax.Array | int = 0,
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
    layer: scalar int32, or [n].
    blocks: [B, K, n] int32, most critical first along n; -1: nothing. Beyond the end of a shorter list all are -1: hits
      change places, so that anything else there can come before the list's own blocks.
    length: [B, K] int32, blocks of each list; carried along.
    given: int32 of any shape; its sum is how many of the first victims the step has used, by `Located.given`.
    group: blocks that may change places, so that hits come first; a power of two, or None for the whole list.
    implementation: "xla", "triton" or "interpret".

  Raises:
    ValueError: `group` is not a power of two, or lists have no blocks.
  """
  triton.check(implementation)
  n = blocks.shape[-1]
  if n == 0:
    raise ValueError("lists of 0 blocks")
  group = n if group is None else min(group, n)
  if group < 1 or (group != n and group & (group - 1)):
    raise ValueError(f"{group=} is not a power of two")
  cut = _Cut(*blocks.shape, group)
  if maps.last_used.shape[0] == 0:
    nowhere = jnp.full_like(blocks, -1)
    return Located(blocks, nowhere, nowhere, jnp.zeros((*blocks.shape[:2], cut.n_groups), jnp.int32), length)
  given = jnp.asarray(given)
  if implementation == "xla":
    return _propose_xla(cut, maps, victims, layer, blocks, length, given)
  return _propose_kernels(cut, maps, victims, layer, blocks, length, given, implementation)


def commit(
  maps: Maps,
  layer: jax.Array,
  located: Located,
  attended: jax.Array,
  stamp: jax.Array,
  step: jax.Array,
  *,
  implementation: str = "xla",
) -> Maps:
  """Maps after attention read the first `attended` [B, K] blocks of the lists; in place when donated.

  A block beyond `attended` was neither read nor copied, so its slot still holds what it held. `stamp` is like `layer`;
  `step` [B] int32 is each request's own step number.
  """
  triton.check(implementation)
  if implementation == "xla":
    return _commit_xla(maps, layer, located, attended, stamp, step)
  return _commit_kernel(maps, layer, located, attended, stamp, step, implementation)


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


def _only(keep: jax.Array, index: jax.Array, size: int) -> jax.Array:
  """`index` where `keep`, else out of range: scatters drop it, gathers fill it."""
  return jnp.where(keep, index, size)


def _left(cut: _Cut, maps: Maps, victims: Victims, claimed: jax.Array, given: jax.Array) -> jax.Array:
  """The victims that are left from `given` on, in order, among as many places as lists have entries; then -1."""
  n_slots = maps.last_used.shape[0]
  n = min(n_slots, cut.n_lists * cut.n)
  slots = victims.slots.at[given.sum() + jnp.arange(n)].get(mode="fill", fill_value=-1)
  left = (slots >= 0) & unused(maps.last_used[slots], victims.since) & (claimed[slots] == 0)
  at = _only(left, jnp.cumsum(left.astype(jnp.int32)) - 1, n)
  return jnp.full(n, -1, jnp.int32).at[at].set(slots, mode="drop")


# ------------------------------------------------------------------------------------------------------------------ XLA


def _propose_xla(cut: _Cut, maps, victims, layer, blocks, length, given) -> Located:
  n_slots = maps.last_used.shape[0]
  k = jnp.arange(cut.n_heads)[None, :, None]
  slot = jnp.where(blocks >= 0, maps.slot_of[k, _by_rank(layer), blocks], -1)
  hit = slot >= 0
  claimed = jnp.zeros(n_slots, jnp.int8).at[_only(hit, slot, n_slots)].set(1, mode="drop")
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
    place = left.at[_only(miss, turn, n_slots)].get(mode="fill", fill_value=-1)

  hits = by_group(hit, False)
  order = jnp.argsort(~hits, axis=-1, stable=True)
  blocks, slot, place = (by_list(jnp.take_along_axis(by_group(x, -1), order, -1)) for x in (blocks, slot, place))
  return Located(blocks, slot, place, hits.sum(-1, dtype=jnp.int32), length)


def _look_xla(maps, victims, claimed, index, miss) -> jax.Array:
  """Slots for the misses of lists of one group; `index` is the place that each looks at first."""
  n_slots, stride = maps.last_used.shape[0], miss.sum()

  def look_further(state):
    look, index, place, wanting = state
    victim = victims.slots.at[_only(wanting, index, n_slots)].get(mode="fill", fill_value=-1)
    found = (victim >= 0) & unused(maps.last_used[victim], victims.since) & (claimed[victim] == 0)
    index += stride
    return look + 1, index, jnp.where(found, victim, place), wanting & ~found & (index < n_slots)

  def more(state):
    look, _, _, wanting = state
    return (look < LOOKS) & wanting.any()

  nowhere = jnp.full_like(index, -1)
  return jax.lax.while_loop(more, look_further, (jnp.int32(0), index, nowhere, miss))[2]


def _commit_xla(maps, layer, located, attended, stamp, step) -> Maps:
  n_heads, n_layers, n_pool = maps.slot_of.shape
  n_slots = maps.last_used.shape[0]
  blocks, layer = located.blocks, _by_rank(layer)
  k = jnp.arange(n_heads)[None, :, None]
  reached = (jnp.arange(blocks.shape[2])[None, None] < attended[..., None]) & (blocks >= 0)
  step = jnp.broadcast_to(step[:, None, None], blocks.shape)
  last_selected = maps.last_selected.at[k, layer, _only(reached, blocks, n_pool)].set(step, mode="drop")
  if n_slots == 0:
    return maps._replace(last_selected=last_selected)

  enters = reached & (located.place >= 0)
  into = _only(enters, located.place, n_slots)
  old = jnp.where(enters, maps.block_of.at[into].get(mode="fill", fill_value=-1), -1)
  head, rest = old // (n_layers * n_pool), old % (n_layers * n_pool)
  head = _only(old >= 0, head, n_heads)
  slot_of = maps.slot_of.at[head, rest // n_pool, rest % n_pool].set(-1, mode="drop")
  slot_of = slot_of.at[k, layer, _only(enters, blocks, n_pool)].set(located.place, mode="drop")
  block_of = maps.block_of.at[into].set((k * n_layers + layer) * n_pool + blocks, mode="drop")
  touched = jnp.where(reached & located.hit, located.slot, into)
  last_used = maps.last_used.at[touched].set(jnp.broadcast_to(_by_rank(stamp), blocks.shape), mode="drop")
  return Maps(slot_of, block_of, last_used, last_selected)


def _by_rank(x: jax.Array) -> jax.Array:
  """A scalar or [n] against lists [B, K, n]."""
  return jnp.reshape(x, (1, 1, -1))


# -------------------------------------------------------------------------------------------------------------- kernels


def _propose_kernels(cut: _Cut, maps, victims, layer, blocks, length, given, implementation) -> Located:
  """Two kernels of one program for each list and chunk of ranks: the second needs the misses of all lists."""
  n_slots, layer = maps.last_used.shape[0], jnp.reshape(layer, -1).astype(jnp.int32)
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
    out_shape=(of_list, counts, jax.ShapeDtypeStruct((n_slots,), jnp.int8)),
    input_output_aliases={3: 2},
    name="look_up",
  )(layer, blocks, maps.slot_of, jnp.zeros(n_slots, jnp.int8))

  if cut.n_groups == 1:
    since = jnp.reshape(victims.since, 1)
    kernel = _assign
    operands = given.ravel(), since, misses.ravel(), victims.slots, maps.last_used, claimed
  else:
    kernel = _assign_left
    misses = misses.ravel()
    operands = jnp.cumsum(misses) - misses, _left(cut, maps, victims, claimed, given)
  out = call(functools.partial(kernel, cut), out_shape=(of_list, of_list, of_list, of_group), name="assign")
  return Located(*out(blocks, slot, *operands), length=length)


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
  claimed_ref,  # [P], 1 where a slot holds a block of the call
):
  c, i, b, k, rank = _ranks(cut)
  exists, at = rank < cut.n, jnp.minimum(rank, cut.n - 1)
  block = jnp.where(exists, blocks_ref[b, k, at], -1)
  of_layer = layer_ref[0] if layer_ref.shape[0] == 1 else layer_ref[at]
  slot = jnp.where(block >= 0, slot_of_ref[k, of_layer, jnp.maximum(block, 0)], -1)
  hit, n_slots = slot >= 0, claimed_ref.shape[0]
  triton.store(slot_ref.at[b, k, rank], slot, mask=exists)
  triton.store(claimed_ref.at[_only(hit, slot, n_slots)], jnp.ones((cut.chunk,), jnp.int8), mask=hit)
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
  claimed_ref,  # [P]
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


def _assign_left(
  cut: _Cut,
  blocks_ref,  # [B, K, n]
  slot_ref,  # [B, K, n]
  before_ref,  # [groups * B * K], misses that come before a group of a list
  left_ref,  # victims that are left
  *out_refs,
):
  """Lists of several groups: the t-th miss of all gets the t-th victim that is left."""
  c, i, b, k, rank = _ranks(cut)
  block, slot, miss = _list(cut, blocks_ref, slot_ref, b, k, rank)
  n_left, groups = left_ref.shape[0], cut.groups_of_chunk
  before = before_ref[(c * groups + jnp.arange(groups)) * cut.n_lists + i]
  turn = before[:, None] + jnp.cumsum(jnp.reshape(miss, (groups, cut.width)), 1) - 1
  turn = jnp.reshape(turn, (cut.chunk,))
  finds = (miss == 1) & (turn < n_left)
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


def _commit_kernel(maps, layer, located, attended, stamp, step, implementation) -> Maps:
  n_rows, n_heads, n = located.blocks.shape
  chunk, has_slots = min(CHUNK, pl.next_power_of_2(n)), maps.last_used.shape[0] > 0
  layer, stamp = (jnp.reshape(x, -1).astype(jnp.int32) for x in (layer, stamp))
  maps_in = maps if has_slots else maps._replace(block_of=jnp.zeros(1, jnp.int32), last_used=jnp.zeros(1, jnp.int32))
  out = triton.call(
    functools.partial(_commit, chunk, has_slots),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in maps_in],
    grid=(-(-n // chunk), n_rows * n_heads),
    input_output_aliases={7 + i: i for i in range(4)},
    implementation=implementation,
    num_warps=1,
    name="commit",
  )(layer, stamp, step, attended, located.blocks, located.slot, located.place, *maps_in)
  return Maps(*out) if has_slots else maps._replace(last_selected=out[3])


def _commit(
  chunk: int,
  has_slots: bool,
  layer_ref,  # [1] or [n]
  stamp_ref,  # [1] or [n]
  step_ref,  # [B]
  attended_ref,  # [B, K]
  blocks_ref,  # [B, K, n]
  slot_ref,  # [B, K, n]
  place_ref,  # [B, K, n]
  *maps_refs,  # the four maps, then the same as results
):
  slot_of_ref, block_of_ref, last_used_ref, last_selected_ref = maps_refs[4:]
  (n_heads, n_layers, n_pool), n_slots, n = slot_of_ref.shape, last_used_ref.shape[0], blocks_ref.shape[2]
  b, k = jax.lax.div(pl.program_id(1), n_heads), jax.lax.rem(pl.program_id(1), n_heads)
  rank = pl.program_id(0) * chunk + jnp.arange(chunk)
  live = rank < jnp.minimum(attended_ref[b, k], n)
  rank = jnp.minimum(rank, n - 1)
  block, slot, place = blocks_ref[b, k, rank], slot_ref[b, k, rank], place_ref[b, k, rank]
  of_layer = layer_ref[0] if layer_ref.shape[0] == 1 else layer_ref[rank]
  now = stamp_ref[0] if stamp_ref.shape[0] == 1 else stamp_ref[rank]
  now, of_layer = (jnp.broadcast_to(x, (chunk,)) for x in (now, of_layer))

  reached = live & (block >= 0)
  to = _only(reached, block, n_pool)
  triton.store(last_selected_ref.at[k, of_layer, to], jnp.full((chunk,), step_ref[b]), mask=reached)
  if has_slots:
    enters = reached & (place >= 0)
    into = _only(enters, place, n_slots)
    old = jnp.where(enters, block_of_ref[jnp.where(enters, place, 0)], -1)
    evicted, old = old >= 0, jnp.maximum(old, 0)
    head = jax.lax.div(old, jnp.full_like(old, n_layers * n_pool))
    rest = old - head * (n_layers * n_pool)
    old_layer = jax.lax.div(rest, jnp.full_like(rest, n_pool))
    gone = jnp.full((chunk,), -1, jnp.int32)
    old_block = _only(evicted, rest - old_layer * n_pool, n_pool)
    triton.store(slot_of_ref.at[head, old_layer, old_block], gone, mask=evicted)
    triton.store(slot_of_ref.at[k, of_layer, _only(enters, block, n_pool)], place, mask=enters)
    triton.store(block_of_ref.at[into], (k * n_layers + of_layer) * n_pool + block, mask=enters)
    touched = enters | (reached & (slot >= 0))
    at = jnp.where(touched, jnp.maximum(slot, place), n_slots)
    triton.store(last_used_ref.at[at], now, mask=touched)
