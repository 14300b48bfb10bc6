"""Block copies between the pool (host memory), the slots (HBM) and arrays of a step.

FlashH2D and the direct save of SparseServe, section 3.2: one program a block, no staging, no call per block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import reference, triton


def empty(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
  """An uninitialised array, made by a kernel that writes nothing: pinned host memory never passes through HBM."""
  return triton.call(lambda _: None, out_shape=jax.ShapeDtypeStruct(shape, dtype), interpret=False, name="empty")()


def load_blocks(
  pool: jax.Array,
  slots: jax.Array,
  layer: jax.Array,
  blocks: jax.Array,
  slot: jax.Array,
  *,
  implementation: str = "xla",
) -> jax.Array:
  """Copies blocks from the pool into their slots; returns `slots`, updated in place when donated.

  Args:
    pool: [K, L, M, 2, S, D].
    slots: [P, 2, S, D].
    layer: scalar int32.
    blocks: [B, K, n] int32; -1: nothing to do.
    slot: [B, K, n] int32, distinct; -1: nothing to do.
    implementation: "xla", "triton" or "interpret".
  """
  if implementation == "xla":
    return reference.load_blocks(pool, slots, layer, blocks, slot)

  def kernel(layer_ref, blocks_ref, slot_ref, pool_ref, _, slots_ref):
    b, k, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block, to = blocks_ref[b, k, i], slot_ref[b, k, i]

    @pl.when((block >= 0) & (to >= 0))
    def _():
      slots_ref[to] = pool_ref[k, layer_ref[0], block]

  return triton.call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(slots.shape, slots.dtype),
    grid=blocks.shape,
    input_output_aliases={4: 0},
    interpret=implementation == "interpret",
    name="load_blocks",
  )(jnp.reshape(layer, 1), blocks, slot, pool, slots)


def gather_blocks(
  pool: jax.Array,
  slots: jax.Array,
  layer: jax.Array,
  blocks: jax.Array,
  slot: jax.Array,
  *,
  implementation: str = "xla",
) -> jax.Array:
  """Blocks [K, n, 2, S, D] of one layer, contiguous: from their slots, or from the pool where `slot` is -1.

  Args:
    pool: [K, L, M, 2, S, D].
    slots: [P, 2, S, D].
    layer: scalar int32.
    blocks: [K, n] int32; an entry below 0 gives an unspecified block.
    slot: [K, n] int32.
    implementation: "xla", "triton" or "interpret".
  """
  if implementation == "xla":
    return reference.gather_blocks(pool, slots, layer, blocks, slot)

  def kernel(layer_ref, blocks_ref, slot_ref, pool_ref, slots_ref, out_ref):
    k, i = pl.program_id(0), pl.program_id(1)
    block, at = blocks_ref[k, i], slot_ref[k, i]

    @pl.when(at >= 0)
    def _():
      out_ref[k, i] = slots_ref[at]

    @pl.when((at < 0) & (block >= 0))
    def _():
      out_ref[k, i] = pool_ref[k, layer_ref[0], block]

  if slots.shape[0] == 0:
    slots = jnp.zeros((1, *slots.shape[1:]), slots.dtype)  # an operand must hold something; `slot` is -1 throughout
  return triton.call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((*blocks.shape, *pool.shape[3:]), pool.dtype),
    grid=blocks.shape,
    interpret=implementation == "interpret",
    name="gather_blocks",
  )(jnp.reshape(layer, 1), blocks, slot, pool, slots)


def store_blocks(
  pool: jax.Array,
  source: jax.Array,
  layer: jax.Array | int,
  source_ids: jax.Array,
  blocks: jax.Array,
  *,
  implementation: str = "xla",
) -> jax.Array:
  """Writes finished blocks to the pool; returns it, updated in place when donated.

  Args:
    pool: [K, L, M, 2, S, D].
    source: [K, Ls, n_source, 2, S, D], blocks of the Ls layers that begin at `layer`.
    layer: scalar int32.
    source_ids: [n] int32, which of the source's blocks.
    blocks: [n] int32, DRAM block of each; -1: nothing to do.
    implementation: "xla", "triton" or "interpret".
  """
  if implementation == "xla":
    return reference.store_blocks(pool, source, layer, source_ids, blocks)

  def kernel(layer_ref, ids_ref, blocks_ref, source_ref, _, pool_ref):
    k, j, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block = blocks_ref[i]

    @pl.when(block >= 0)
    def _():
      pool_ref[k, layer_ref[0] + j, block] = source_ref[k, j, ids_ref[i]]

  return triton.call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
    grid=(*source.shape[:2], blocks.shape[0]),
    input_output_aliases={4: 0},
    interpret=implementation == "interpret",
    name="store_blocks",
  )(jnp.reshape(layer, 1).astype(jnp.int32), source_ids, blocks, source, pool)


def place_blocks(
  slots: jax.Array, source: jax.Array, source_ids: jax.Array, slot: jax.Array, *, implementation: str = "xla"
) -> jax.Array:
  """Copies blocks that are on the device into slots; returns `slots`, updated in place when donated.

  Apart from `store_blocks` because XLA gives all results of one kernel the same memory space.

  Args:
    slots: [P, 2, S, D].
    source: [K, Ls, n_source, 2, S, D].
    source_ids: [n] int32, which of the source's blocks.
    slot: [K, Ls, n] int32, distinct; -1: nothing to do.
    implementation: "xla", "triton" or "interpret".
  """
  if slots.shape[0] == 0:
    return slots
  if implementation == "xla":
    return reference.place_blocks(slots, source, source_ids, slot)

  def kernel(ids_ref, slot_ref, source_ref, _, slots_ref):
    k, j, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    to = slot_ref[k, j, i]

    @pl.when(to >= 0)
    def _():
      slots_ref[to] = source_ref[k, j, ids_ref[i]]

  return triton.call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(slots.shape, slots.dtype),
    grid=slot.shape,
    input_output_aliases={3: 0},
    interpret=implementation == "interpret",
    name="place_blocks",
  )(source_ids, slot, source, slots)
