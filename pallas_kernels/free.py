"""Slots that are free: `evict` empties the first victims, and blocks that enter `take` what is empty.

So a block may be listed and turn out not to be read, as in progressive lists, and its slot still be the next that goes:
what a call needs is emptied after the call before it, when it is known what that one has read, and not while it runs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int32

from pallas_kernels import triton
from pallas_kernels.maps import Maps, Victims, only, total, unused

CHUNK = 1024  # victims that a program looks at together


class Free(NamedTuple):
  """A queue of empty slots for each zone: the entries [taken, made) are there to be taken."""

  slots: Int32[Array, "Z W"]
  taken: Int32[Array, " Z"]  # beyond `made` until the next `evict`, if some came too late
  made: Int32[Array, " Z"]
  seen: Int32[Array, " Z"]  # of the zone's victims: those before that have been given or emptied, or were used
  zone: Int32[Array, " rows"] | None = None  # as `Victims.zone`

  @classmethod
  def at_first(cls, maps: Maps, victims: Victims, given: Int32[Array, "*any"]) -> Free:
    """The empty slots that come next when the first `given` victims have been given, as `propose` has it."""
    n, given = victims.slots.shape[1], _of_zones(victims, given)
    full = (maps.block_of[victims.slots] >= 0) & (jnp.arange(n)[None] >= given[:, None])
    end = jnp.where(full.any(1), jnp.argmax(full, 1).astype(jnp.int32), jnp.maximum(given, n))
    return cls(victims.slots, given, end, end)

  @classmethod
  def nothing(cls, victims: Victims, given: Int32[Array, "*any"], n: int) -> Free:
    """No slot yet, and room for `n` of each zone, when the first `given` victims have been given."""
    zero = jnp.zeros(victims.slots.shape[0], jnp.int32)
    return cls(jnp.zeros((zero.shape[0], n), jnp.int32), zero, zero, _of_zones(victims, given))

  def take(self, wanting: Bool[Array, "B K n"], zone: Int32[Array, "rows ranks"]) -> tuple[Int32[Array, "B K n"], Free]:
    """Slots for those that are `wanting` one, -1 where there is none any more; what is left.

    Turns go rank by rank, in each zone apart. `zone` is that of every row [B, 1], of every rank [1, n], or of all
    [1, 1]; those of different rows or ranks are distinct.
    """
    rows_first = (0, 2, 1) if zone.shape[0] > 1 else (2, 0, 1)
    in_turn = wanting.transpose(rows_first).astype(jnp.int32)
    zone = zone.ravel()
    queues = in_turn.reshape(zone.size, -1)
    at = self.taken[zone][:, None] + jnp.cumsum(queues, 1) - 1
    found = (queues == 1) & (at < self.made[zone][:, None])
    place = jnp.where(found, self.slots.at[zone[:, None], at].get(mode="clip"), -1).reshape(in_turn.shape)
    place = place.transpose([rows_first.index(axis) for axis in range(3)])
    return place, self._replace(taken=self.taken.at[zone].add(queues.sum(1)))


def vacate(
  maps: Maps,
  victims: Victims,
  free: Free,
  new: Bool[Array, "B K n"],
  zone: Int32[Array, "rows ranks"],
  *,
  implementation: str = "xla",
) -> tuple[Maps, Int32[Array, "B K n"], Free]:
  """Empty slots for those that are `new`, -1 for others and where there is no victim any more: `evict`, then `take`."""
  wanted = new.sum(dtype=jnp.int32)  # not in `evict`: one program cannot hold lists that are as long as prompts
  if (n_zones := victims.slots.shape[0]) > 1:
    wanted = jnp.zeros(n_zones, jnp.int32).at[jnp.broadcast_to(zone[:, None], new.shape)].add(new.astype(jnp.int32))
  maps, free = evict(maps, victims, free, wanted, implementation=implementation)
  place, free = free.take(new, zone)
  return maps, place, free


def _of_zones(victims: Victims, counts) -> jax.Array:
  """[Z], of one zone the sum."""
  return jnp.reshape(counts.sum(), 1) if victims.slots.shape[0] == 1 else counts


def evict(
  maps: Maps, victims: Victims, free: Free, wanted: Int32[Array, "*any"], *, implementation: str = "xla"
) -> tuple[Maps, Free]:
  """Empties the next victims until so many slots are free; maps and queue are updated in place when donated.

  Args:
    maps: of one device.
    victims: made at the beginning of the step. One that has been used since then is passed over.
    free: the queue.
    wanted: how many slots of each zone are to be free; with one zone their sum.
    implementation: "xla", "triton" or "interpret".
  """
  triton.check(implementation)
  if maps.last_used.shape[0] == 0:
    return maps, free
  run = _evict_xla if implementation == "xla" else functools.partial(_evict_kernel, implementation)
  return run(maps, victims, free, wanted)


def _evict_xla(maps: Maps, victims: Victims, free: Free, wanted) -> tuple[Maps, Free]:
  (n_zones, n), n_slots = victims.slots.shape, maps.last_used.shape[0]
  _, n_layers, n_pool = maps.slot_of.shape
  wanted = _of_zones(victims, wanted)
  at = jnp.arange(n, dtype=jnp.int32)[None]
  left = unused(maps.last_used[victims.slots], victims.since) & (at >= free.seen[:, None])
  to = free.made[:, None] + jnp.cumsum(left.astype(jnp.int32), 1) - 1
  taken = jnp.minimum(free.taken, free.made)
  end = taken + wanted
  goes = left & (to < end[:, None])
  zone = jnp.arange(n_zones)[:, None]
  queue = free.slots.at[zone, only(goes, to, free.slots.shape[1])].set(victims.slots, mode="drop")
  made = free.made + goes.sum(1, dtype=jnp.int32)
  last = jnp.where(goes, at, -1).max(1) + 1
  seen = jnp.where(end <= free.made, free.seen, jnp.where(made >= end, last, n))

  slots = only(goes, victims.slots, n_slots).ravel()
  old = maps.block_of.at[slots].get(mode="fill", fill_value=-1)
  head = only(old >= 0, old // (n_layers * n_pool), maps.slot_of.shape[0])
  rest = old % (n_layers * n_pool)
  maps = maps._replace(
    slot_of=maps.slot_of.at[head, rest // n_pool, rest % n_pool].set(-1, mode="drop"),
    block_of=maps.block_of.at[slots].set(-1, mode="drop"),
    last_used=maps.last_used.at[slots].set(-1, mode="drop"),
  )
  return maps, free._replace(slots=queue, taken=taken, made=made, seen=seen)


def _evict_kernel(implementation: str, maps: Maps, victims: Victims, free: Free, wanted) -> tuple[Maps, Free]:
  """One program a zone: what is wanted is mostly among the first victims that it looks at."""
  state = maps.slot_of, maps.block_of, maps.last_used, free.slots, free.taken, free.made, free.seen
  out = triton.call(
    _evict,
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state],
    grid=(victims.slots.shape[0],),
    input_output_aliases={3 + i: i for i in range(len(state))},
    implementation=implementation,
    name="evict",
  )(jnp.reshape(victims.since, 1), victims.slots, wanted.ravel(), *state)
  slot_of, block_of, last_used, slots, taken, made, seen = out
  maps = maps._replace(slot_of=slot_of, block_of=block_of, last_used=last_used)
  return maps, free._replace(slots=slots, taken=taken, made=made, seen=seen)


def _evict(
  since_ref,  # [1]
  victims_ref,  # [Z, P / Z]
  wanted_ref,  # [Z], or any count where Z = 1
  *state_refs,  # seven, then the same as results
):
  slot_of_ref, block_of_ref, last_used_ref, queue_ref, taken_ref, made_ref, seen_ref = state_refs[7:]
  (n_heads, n_layers, n_pool), (n_zones, n) = slot_of_ref.shape, victims_ref.shape
  n_slots, width = last_used_ref.shape[0], queue_ref.shape[1]
  zone = pl.program_id(0)
  first = made_ref[zone]
  taken = jnp.minimum(taken_ref[zone], first)
  end = taken + (total(wanted_ref) if n_zones == 1 else wanted_ref[zone])

  def empty(state):
    made, seen = state
    at = seen + jnp.arange(CHUNK)
    slot = victims_ref[zone, jnp.minimum(at, n - 1)]
    left = ((at < n) & unused(last_used_ref[slot], since_ref[0])).astype(jnp.int32)
    to = made + jnp.cumsum(left) - 1
    goes = (left == 1) & (to < end)
    old = jnp.where(goes, block_of_ref[slot], -1)
    evicted, old = old >= 0, jnp.maximum(old, 0)
    head = jax.lax.div(old, jnp.full_like(old, n_layers * n_pool))
    rest = old - head * (n_layers * n_pool)
    layer = jax.lax.div(rest, jnp.full_like(rest, n_pool))
    block = only(evicted, rest - layer * n_pool, n_pool)
    gone = jnp.full((CHUNK,), -1, jnp.int32)
    triton.store(slot_of_ref.at[jnp.minimum(head, n_heads - 1), layer, block], gone, mask=evicted)
    triton.store(block_of_ref.at[only(goes, slot, n_slots)], gone, mask=goes)
    triton.store(last_used_ref.at[only(goes, slot, n_slots)], gone, mask=goes)
    triton.store(queue_ref.at[zone, only(goes, to, width)], slot, mask=goes)
    after = jnp.minimum(made + jnp.sum(left), end)
    whole = jnp.minimum(seen + CHUNK, n)
    return after, jnp.where(after < end, whole, jnp.max(jnp.where(goes, at, -1)) + 1)

  def more(state):
    return (state[0] < end) & (state[1] < n)

  made, seen = jax.lax.while_loop(more, empty, (first, seen_ref[zone]))
  taken_ref[zone], made_ref[zone], seen_ref[zone] = taken, made, seen
