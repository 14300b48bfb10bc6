"""The KV cache as a value: a pool of all blocks, HBM slots for the hot ones, and what is known of each request.

`KVCache` is a frozen pytree. Every transition returns a new one and, with the old one donated, updates its arrays in
place. Correctness never depends on what is in the slots: a block is always in the pool, and whatever misses is read
from there.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

import pallas_kernels as kernels
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.mesh import AXIS


class Hot(flax.struct.PyTreeNode):
  """What of a cache always lies on the device. A lane is the place of one resident request."""

  slots: Float[Array, "P 2 S D"]  # shared by all layers, heads and requests; P = 0 without offload
  digest: Float[Array, "K L M E D"]  # what selection reads
  maps: kernels.Maps  # which block is in which slot
  tail: Float[Array, "K L R 2 S D"]  # the unfinished block of every lane
  tables: Int32[Array, "R N"]  # pool block of every full block of a lane, written at admission and as blocks fill
  last_token: Int32[Array, " R"]  # input of each lane's next step
  # Programs run so far. Stamps wrap around, and residency looks at differences only, of which none reaches 2^31
  # (`kernels.saturate`), but for -1: an empty slot. A stamp that equals it, one in 2^32, makes a slot look empty: it is
  # given up early, and nothing becomes wrong.
  clock: Int32[Array, ""]
  # What `memory.host_pool` knows the pool's part on this device by; None if nothing on the host reads or writes it.
  pool_id: Int32[Array, " parts"] | None = None

  def stamp(self, layer: jax.Array | int) -> jax.Array:
    """Time of use of a `layer` in the step that begins now, ascending through layers and steps."""
    return self.clock * self.tail.shape[1] + layer


class KVCache(flax.struct.PyTreeNode):
  """All KV of all resident requests. A block is one KV head's K and V of S tokens in one layer: [2, S, D].

  K is split over the mesh axis "tp"; so is P, and slot ids are of one device.
  """

  pool: Float[Array, "K L M 2 S D"]  # every finished block; pinned host memory when offloading on a GPU
  hot: Hot


def cache_specs() -> KVCache:
  """The PartitionSpec of every array of the cache: split by KV head or by slot, or whole on every device."""
  split: Any = P(AXIS)
  whole: Any = P()
  maps = kernels.Maps(*[split] * len(kernels.Maps._fields))
  return KVCache(split, Hot(split, split, maps, split, tables=whole, last_token=whole, clock=whole, pool_id=split))


def cache_shardings(mesh: Mesh, offload: bool) -> KVCache:
  """The sharding of every array of the cache, with the memory kind of a pool where it is an `offload`ed one."""
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs())
  kind = host_pool.memory_kind() if offload else None
  return shardings.replace(pool=NamedSharding(mesh, P(AXIS), memory_kind=kind))


def release_and_admit(
  hot: Hot, freed: Int32[Array, " n"], idle: Int32[Array, " n"], lanes: Int32[Array, " a"], tables: Int32[Array, "a N"]
) -> Hot:
  """Releases blocks, and gives lanes to requests.

  Args:
    hot: of this device's cache.
    freed: blocks of the pool (-1: nothing) that were in slots, which is forgotten.
    idle: blocks (-1: nothing) whose slots become spare.
    lanes: those that get a request (R: there is none).
    tables: the block table of each lane's request, -1 beyond its end.
  """
  maps = kernels.rest(kernels.release(kernels.tidy(hot.maps), freed), idle, hot.stamp(0))
  return hot.replace(maps=maps, tables=hot.tables.at[lanes].set(tables, mode="drop"))


def working_sets(
  hot: Hot, lanes: Int32[Array, " B"], n_blocks: Int32[Array, " B"], steps: Int32[Array, " B"], width: int, w: int
) -> Int32[Array, " B"]:
  """Blocks that each request selected in its last `w` steps, over this device's layers and heads (SparseServe, section
  3.3). One that several requests share is the last one's that selected it, as far as their step numbers tell.

  Args:
    hot: of this device's cache.
    lanes: of the requests.
    n_blocks: full blocks of each request, at most `width`.
    steps: steps that each request has made: its newest has number steps - 1.
    width: entries of a table that are looked at.
    w: window in steps.
  """
  tables = hot.tables.at[lanes].get(mode="clip")[:, :width]

  def one(table, n, step):
    last = hot.maps.last_selected[:, :, table]  # [K, L, N]
    selected = (last >= step - w) & (last < step)
    return (selected & (jnp.arange(width) < n)[None, None]).sum(dtype=jnp.int32)

  return jax.lax.map(lambda row: one(*row), (tables, n_blocks, steps))
