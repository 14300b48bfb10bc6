"""Block copies between the pool (host memory), the slots (HBM) and arrays of a step.

FlashH2D and the direct save of SparseServe, section 3.2: one kernel copies a whole list of blocks, without staging and
without a call for each. Kernels take powers of two for S and D; other sizes are a NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels import triton

PCIE_PROGRAMS = 32  # keep PCIe busy and leave most SMs alone
HBM_PROGRAMS = 1024  # fill every SM several times over
LANES = 32  # entries of a list looked at together: one warp's worth, so looking needs no barrier
PART_BYTES = 16 << 10  # held in registers at a time: 128 bytes in each of 128 threads


def load_blocks(
  pool: Float[Array, "K L M 2 S D"],
  slots: Float[Array, "P 2 S D"],
  layer: Int32[Array, ""] | int,
  blocks: Int32[Array, "B K n"],
  slot: Int32[Array, "B K n"],
  *,
  implementation: str = "xla",
) -> Float[Array, "P 2 S D"]:
  """Copies blocks from the pool into their slots; returns `slots`, updated in place when donated.

  Args:
    pool: every finished block.
    slots: written.
    layer: of the pool.
    blocks: -1: nothing to do.
    slot: distinct; -1: nothing to do.
    implementation: "xla", "triton" or "interpret".
  """
  triton.check(implementation, S=pool.shape[4], D=pool.shape[5])
  if implementation == "xla":
    return _load_blocks_xla(pool, slots, layer, blocks, slot)
  n_heads, n = blocks.shape[1:]

  def wanted(e, _layer, blocks_ref, slot_ref, *_):
    return (blocks_ref[e] >= 0) & (slot_ref[e] >= 0)

  def copy(e, layer_ref, blocks_ref, slot_ref, pool_ref, _slots, slots_ref):
    head, block, to = jax.lax.rem(jax.lax.div(e, n), n_heads), blocks_ref[e], slot_ref[e]
    for part in _parts(pool):
      slots_ref[to, *part] = pool_ref[head, layer_ref[0], block, *part]

  operands = jnp.reshape(layer, 1), blocks.reshape(-1), slot.reshape(-1), pool, slots
  return _run("load_blocks", blocks.size, PCIE_PROGRAMS, wanted, copy, operands, slots, implementation)


def gather_blocks(
  pool: Float[Array, "K L M 2 S D"],
  slots: Float[Array, "P 2 S D"],
  layer: Int32[Array, ""] | int,
  blocks: Int32[Array, "K n"],
  slot: Int32[Array, "K n"],
  *,
  implementation: str = "xla",
) -> tuple[Float[Array, "n*S K D"], Float[Array, "n*S K D"]]:
  """Keys and values of one layer's blocks: from their slots, or from the pool where `slot` is -1.

  Args:
    pool: every finished block.
    slots: copies of some of them.
    layer: of the pool.
    blocks: -1 gives zeros, anything below that whatever the memory holds.
    slot: where each block is, or -1.
    implementation: "xla", "triton" or "interpret".
  """
  size, depth = pool.shape[4:]
  triton.check(implementation, S=size, D=depth)
  if implementation == "xla":
    return _gather_blocks_xla(pool, slots, layer, blocks, slot)
  n_heads, n = blocks.shape

  def wanted(e, _layer, blocks_ref, *_):
    return blocks_ref[e] >= -1

  def copy(e, layer_ref, blocks_ref, slot_ref, pool_ref, slots_ref, *out_refs):
    # Entries that follow each other are heads of one place: they write neighbouring lines.
    i, head = jax.lax.div(e, n_heads), jax.lax.rem(e, n_heads)
    block, at = blocks_ref[e], slot_ref[e]

    def write(read):
      for half, *rows in _parts(pool, halves=True):
        out_refs[half][i, *rows, head] = read(half, *rows)

    @pl.when((block >= 0) & (at >= 0))
    def _():
      write(lambda *part: slots_ref[at, *part])

    @pl.when((block >= 0) & (at < 0))
    def _():
      write(lambda *part: pool_ref[head, layer_ref[0], block, *part])

    @pl.when(block < 0)
    def _():
      write(lambda _, rows: jnp.zeros((rows.size, depth), pool.dtype))

  if slots.shape[0] == 0:
    slots = jnp.zeros((1, *slots.shape[1:]), slots.dtype)  # an operand must hold something; `slot` is -1 throughout
  operands = jnp.reshape(layer, 1), blocks.T.reshape(-1), slot.T.reshape(-1), pool, slots
  out = (jax.ShapeDtypeStruct((n, size, n_heads, depth), pool.dtype),) * 2
  k, v = _run("gather_blocks", blocks.size, HBM_PROGRAMS, wanted, copy, operands, out, implementation)
  return k.reshape(n * size, n_heads, depth), v.reshape(n * size, n_heads, depth)


def store_blocks(
  pool: Float[Array, "K L M 2 S D"],
  source: Float[Array, "K Ls n_source 2 S D"],
  layer: Int32[Array, ""] | int,
  source_ids: Int32[Array, " n"],
  blocks: Int32[Array, " n"],
  *,
  implementation: str = "xla",
) -> Float[Array, "K L M 2 S D"]:
  """Writes finished blocks to the pool; returns it, updated in place when donated.

  Args:
    pool: written.
    source: blocks of the Ls layers that begin at `layer`.
    layer: the first one.
    source_ids: which of the source's blocks.
    blocks: DRAM block of each; -1: nothing to do.
    implementation: "xla", "triton" or "interpret".
  """
  triton.check(implementation, S=pool.shape[4], D=pool.shape[5])
  if implementation == "xla":
    return _store_blocks_xla(pool, source, layer, source_ids, blocks)
  (n_heads, n_layers), n = source.shape[:2], blocks.shape[0]

  def wanted(e, _layer, _ids, blocks_ref, *_):
    return blocks_ref[jax.lax.rem(e, n)] >= 0

  def copy(e, layer_ref, ids_ref, blocks_ref, source_ref, _pool, pool_ref):
    k, j, i = _unravel(e, n_layers, n)
    block, at = blocks_ref[i], ids_ref[i]
    for part in _parts(pool):
      pool_ref[k, layer_ref[0] + j, block, *part] = source_ref[k, j, at, *part]

  operands = jnp.reshape(layer, 1).astype(jnp.int32), source_ids, blocks, source, pool
  n_entries = n_heads * n_layers * n
  return _run("store_blocks", n_entries, PCIE_PROGRAMS, wanted, copy, operands, pool, implementation)


def place_blocks(
  slots: Float[Array, "P 2 S D"],
  source: Float[Array, "K Ls n_source 2 S D"],
  source_ids: Int32[Array, " n"],
  slot: Int32[Array, "K Ls n"],
  *,
  implementation: str = "xla",
) -> Float[Array, "P 2 S D"]:
  """Copies blocks that are on the device into slots; returns `slots`, updated in place when donated.

  Apart from `store_blocks` because XLA gives all results of one kernel the same memory space.

  Args:
    slots: written.
    source: blocks of Ls layers.
    source_ids: which of the source's blocks.
    slot: distinct; -1: nothing to do.
    implementation: "xla", "triton" or "interpret".
  """
  triton.check(implementation, S=slots.shape[2], D=slots.shape[3])
  if implementation == "xla":
    return _place_blocks_xla(slots, source, source_ids, slot)
  n_layers, n = slot.shape[1:]

  def wanted(e, _ids, slot_ref, *_):
    return slot_ref[e] >= 0

  def copy(e, ids_ref, slot_ref, source_ref, _slots, slots_ref):
    k, j, i = _unravel(e, n_layers, n)
    to, at = slot_ref[e], ids_ref[i]
    for part in _parts(slots):
      slots_ref[to, *part] = source_ref[k, j, at, *part]

  operands = source_ids, slot.reshape(-1), source, slots
  return _run("place_blocks", slot.size, HBM_PROGRAMS, wanted, copy, operands, slots, implementation)


def _run(
  name: str,
  n: int,
  programs: int,
  wanted: Callable[..., jax.Array],
  copy: Callable[..., None],
  operands: tuple[jax.Array, ...],
  out: Any,
  implementation: str,
) -> Any:
  """Runs `copy(e, *refs)` for every entry e < n with `wanted(e, *refs)`.

  Entries are dealt out to the programs in turn. An entry that is not wanted costs its share of one vector load. Without
  entries, or places to copy them to, nothing runs.

  Args:
    name: of the kernel.
    n: entries.
    programs: at most so many; each copies one entry after the other.
    wanted: of entries [LANES].
    copy: of one entry.
    operands: what `refs` begins with, index arrays flat; the results follow.
    out: shape of the results. The last operand itself: the result is that one, updated in place.
    implementation: "triton" or "interpret".
  """
  in_place, programs = out is operands[-1], min(programs, n)
  if n == 0 or (in_place and out.size == 0):
    return out if in_place else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)

  def kernel(*refs):
    program, lane = pl.program_id(0), jnp.arange(LANES, dtype=jnp.int32)

    def look(i, _):
      def entry(at):
        return (i * LANES + at) * programs + program

      def after(at):
        return jnp.where(found & (lane > at), lane, LANES).min()

      found = (entry(lane) < n) & wanted(jnp.minimum(entry(lane), n - 1), *refs)

      def step(at):
        copy(entry(at), *refs)
        return after(at)

      jax.lax.while_loop(lambda at: at < LANES, step, after(-1))

    jax.lax.fori_loop(0, -(-n // (LANES * programs)), look, None)

  return triton.call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype) if in_place else out,
    grid=(programs,),
    input_output_aliases={len(operands) - 1: 0} if in_place else {},
    implementation=implementation,
    name=name,
  )(*operands)


def _unravel(e: jax.Array, n_layers: int, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Indices in [K, n_layers, n] of a flat index."""
  div, rem = jax.lax.div, jax.lax.rem  # `//` and `%` of a scalar do not lower
  return div(e, n_layers * n), rem(div(e, n), n_layers), rem(e, n)


def _parts(blocks: jax.Array, halves: bool = False) -> list[tuple]:
  """Indices that cut a block [..., 2, S, D] into parts of at most PART_BYTES; with `halves`, keys apart from values."""
  size, depth = blocks.shape[-2:]
  row = depth * blocks.dtype.itemsize
  if 2 * size * row <= PART_BYTES and not halves:
    return [(slice(None),) * 3]
  rows = min(size, PART_BYTES // row)
  return [(half, pl.ds(start, rows)) for start in range(0, size, rows) for half in (0, 1)]


# ------------------------------------------------------------------------------------------------------------------ XLA


def read_blocks(pool, slots, layer, blocks, slot):
  """Blocks [B, K, n, 2, S, D] from their slots, or from the pool where `slot` is -1."""
  head = jnp.arange(pool.shape[0])[None, :, None]
  from_pool = pool[head, layer, jnp.maximum(blocks, 0)]
  if slots.shape[0] == 0:
    return from_pool
  return jnp.where((slot >= 0)[..., None, None, None], slots[jnp.maximum(slot, 0)], from_pool)


def _load_blocks_xla(pool, slots, layer, blocks, slot) -> jax.Array:
  head = jnp.arange(pool.shape[0])[None, :, None]
  kv = pool[head, layer, jnp.maximum(blocks, 0)]
  return slots.at[jnp.where((blocks >= 0) & (slot >= 0), slot, slots.shape[0])].set(kv, mode="drop")


def _gather_blocks_xla(pool, slots, layer, blocks, slot) -> tuple[jax.Array, jax.Array]:
  kv = read_blocks(pool, slots, layer, blocks[None], slot[None])[0]
  kv = jnp.where((blocks >= 0)[..., None, None, None], kv, 0).transpose(2, 1, 3, 0, 4)  # [2, n, S, K, D]
  k, v = kv.reshape(2, -1, *kv.shape[3:])
  return k, v


def _store_blocks_xla(pool, source, layer, source_ids, blocks) -> jax.Array:
  """A loop, since it must not hold a gathered copy of the source."""

  def store_one(i, pool):
    kv = jax.lax.dynamic_slice_in_dim(source, source_ids[i], 1, 2)  # [K, Ls, 1, 2, S, D]
    at = 0, layer, blocks[i], 0, 0, 0
    return jax.lax.cond(blocks[i] >= 0, lambda: jax.lax.dynamic_update_slice(pool, kv, at), lambda: pool)

  n = blocks.shape[0]
  return jax.lax.fori_loop(0, n, store_one, pool) if n else pool


def _place_blocks_xla(slots, source, source_ids, slot) -> jax.Array:

  def place_one(i, slots):
    kv = jax.lax.dynamic_index_in_dim(source, source_ids[i], 2, keepdims=False)  # [K, Ls, 2, S, D]
    to = slot[:, :, i]
    return slots.at[jnp.where(to >= 0, to, slots.shape[0])].set(kv, mode="drop")

  n = source_ids.shape[0]
  return jax.lax.fori_loop(0, n, place_one, slots) if n and slots.size else slots
