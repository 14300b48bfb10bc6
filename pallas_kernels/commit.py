"""`commit`: the maps after attention has read what `propose` found."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from pallas_kernels import triton
from pallas_kernels.maps import Maps, by_rank, only
from pallas_kernels.residency import CHUNK, Located


def commit(
  maps: Maps,
  layer: Int32[Array, ""] | Int32[Array, " n"] | int,
  located: Located,
  attended: Int32[Array, "B K"],
  stamp: Int32[Array, ""] | Int32[Array, " n"],
  step: Int32[Array, " B"],
  *,
  implementation: str = "xla",
) -> Maps:
  """Maps after attention read the first blocks of the lists; in place when donated.

  A hit that has a place was copied there by a load, whether it was read or not. Any other block beyond `attended` was
  neither read nor copied, so its slot still holds what it held.

  Args:
    maps: of one device.
    layer: of the lists, or of each of their ranks.
    located: the lists, as attention read them.
    attended: how many blocks of each list were read, the first ones.
    stamp: time of use, or that of each rank.
    step: each request's own step number.
    implementation: "xla", "triton" or "interpret".
  """
  triton.check(implementation)
  if implementation == "xla":
    return _commit_xla(maps, layer, located, attended, stamp, step)
  return _commit_kernel(maps, layer, located, attended, stamp, step, implementation)


def _commit_xla(maps, layer, located, attended, stamp, step) -> Maps:
  n_heads, n_layers, n_pool = maps.slot_of.shape
  n_slots = maps.last_used.shape[0]
  blocks, layer = located.blocks, by_rank(layer)
  k = jnp.arange(n_heads)[None, :, None]
  reached = (jnp.arange(blocks.shape[2])[None, None] < attended[..., None]) & (blocks >= 0)
  step = jnp.broadcast_to(step[:, None, None], blocks.shape)
  last_selected = maps.last_selected.at[k, layer, only(reached, blocks, n_pool)].set(step, mode="drop")
  if n_slots == 0:
    return maps._replace(last_selected=last_selected)

  enters = (reached | (located.hit & (blocks >= 0))) & (located.place >= 0)
  into = only(enters, located.place, n_slots)
  old = jnp.where(enters, maps.block_of.at[into].get(mode="fill", fill_value=-1), -1)
  head, rest = old // (n_layers * n_pool), old % (n_layers * n_pool)
  head = only(old >= 0, head, n_heads)
  slot_of = maps.slot_of.at[head, rest // n_pool, rest % n_pool].set(-1, mode="drop")
  slot_of = slot_of.at[k, layer, only(enters, blocks, n_pool)].set(located.place, mode="drop")
  block_of = maps.block_of.at[into].set((k * n_layers + layer) * n_pool + blocks, mode="drop")
  touched = jnp.where(reached & located.hit, located.slot, into)
  now = jnp.broadcast_to(by_rank(stamp), blocks.shape)
  last_used, entered = maps.last_used.at[touched].set(now, mode="drop"), maps.entered.at[into].set(now, mode="drop")
  return Maps(slot_of, block_of, last_used, entered, last_selected)


def _commit_kernel(maps, layer, located, attended, stamp, step, implementation) -> Maps:
  n_rows, n_heads, n = located.blocks.shape
  chunk, has_slots = min(CHUNK, pl.next_power_of_2(n)), maps.last_used.shape[0] > 0
  layer, stamp = (jnp.reshape(x, -1).astype(jnp.int32) for x in (layer, stamp))
  none = jnp.zeros(1, jnp.int32)
  maps_in = maps if has_slots else maps._replace(block_of=none, last_used=none, entered=none)
  out = triton.call(
    functools.partial(_commit, chunk, has_slots),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in maps_in],
    grid=(-(-n // chunk), n_rows * n_heads),
    input_output_aliases={7 + i: i for i in range(len(maps))},
    implementation=implementation,
    num_warps=1,
    name="commit",
  )(layer, stamp, step, attended, located.blocks, located.slot, located.place, *maps_in)
  return Maps(*out) if has_slots else maps._replace(slot_of=out[0], last_selected=out[-1])


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
  *maps_refs,  # the maps, then the same as results
):
  slot_of_ref, block_of_ref, last_used_ref, entered_ref, last_selected_ref = maps_refs[len(maps_refs) // 2 :]
  (n_heads, n_layers, n_pool), n_slots, n = slot_of_ref.shape, last_used_ref.shape[0], blocks_ref.shape[2]
  b, k = jax.lax.div(pl.program_id(1), n_heads), jax.lax.rem(pl.program_id(1), n_heads)
  rank = pl.program_id(0) * chunk + jnp.arange(chunk)
  live, exists = rank < jnp.minimum(attended_ref[b, k], n), rank < n
  rank = jnp.minimum(rank, n - 1)
  block, slot, place = blocks_ref[b, k, rank], slot_ref[b, k, rank], place_ref[b, k, rank]
  of_layer = layer_ref[0] if layer_ref.shape[0] == 1 else layer_ref[rank]
  now = stamp_ref[0] if stamp_ref.shape[0] == 1 else stamp_ref[rank]
  now, of_layer = (jnp.broadcast_to(x, (chunk,)) for x in (now, of_layer))

  reached, listed = live & (block >= 0), exists & (block >= 0)
  to = only(reached, block, n_pool)
  triton.store(last_selected_ref.at[k, of_layer, to], jnp.full((chunk,), step_ref[b]), mask=reached)
  if has_slots:
    enters = (reached | (listed & (slot >= 0))) & (place >= 0)
    into = only(enters, place, n_slots)
    old = jnp.where(enters, block_of_ref[jnp.where(enters, place, 0)], -1)
    evicted, old = old >= 0, jnp.maximum(old, 0)
    head = jax.lax.div(old, jnp.full_like(old, n_layers * n_pool))
    rest = old - head * (n_layers * n_pool)
    old_layer = jax.lax.div(rest, jnp.full_like(rest, n_pool))
    gone = jnp.full((chunk,), -1, jnp.int32)
    old_block = only(evicted, rest - old_layer * n_pool, n_pool)
    triton.store(slot_of_ref.at[head, old_layer, old_block], gone, mask=evicted)
    triton.store(slot_of_ref.at[k, of_layer, only(enters, block, n_pool)], place, mask=enters)
    triton.store(block_of_ref.at[into], (k * n_layers + of_layer) * n_pool + block, mask=enters)
    triton.store(entered_ref.at[into], now, mask=enters)
    touched = enters | (reached & (slot >= 0))
    at = jnp.where(touched, jnp.maximum(slot, place), n_slots)
    triton.store(last_used_ref.at[at], now, mask=touched)
