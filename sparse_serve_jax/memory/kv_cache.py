"""The KV cache as a value: a pool of all blocks, HBM slots for the hot ones, and the maps between them.

`KVCache` is a frozen pytree. Every transition returns a new one and, with the old one donated, updates its arrays in
place. Correctness never depends on what is in the slots: a block is always in the pool, and whatever misses is read
from there.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import residency
from sparse_serve_jax.config import EngineConfig, ModelConfig


class KVCache(flax.struct.PyTreeNode):
  """All KV of all resident requests. A block is one KV head's K and V of S tokens in one layer: [2, S, D].

  K is split over the mesh axis "tp"; so is P, and slot ids are of one device.
  """

  pool: jax.Array  # [K, L, M, 2, S, D], every finished block; pinned host memory when offloading on a GPU
  slots: jax.Array  # [P, 2, S, D], shared by all layers, heads and requests; P = 0 without offload
  digest: jax.Array  # [K, L, M, E, D], what selection reads
  maps: residency.Maps  # which block is in which slot
  tail: jax.Array  # [K, L, R, 2, S, D], the unfinished block of every resident request
  last_token: jax.Array  # [R] int32, input of each resident request's next step
  # int32, programs run so far. Stamps wrap around, and residency looks at differences only, of which none reaches 2^31
  # (`kernels.saturate`), but for -1: an empty slot. A stamp that equals it, one in 2^32, makes a slot look empty: it is
  # given up early, and nothing becomes wrong.
  clock: jax.Array

  def stamp(self, layer: jax.Array | int) -> jax.Array:
    """Time of use, ascending through layers and steps."""
    return self.clock * self.tail.shape[1] + layer


@dataclasses.dataclass(frozen=True)
class CacheShape:
  """Sizes over all devices. `K, L, M, P, R, S, D, E` are the alphabet's."""

  K: int
  L: int
  M: int
  P: int
  R: int
  S: int
  D: int
  E: int
  dtype: str
  offload: bool
  max_context: int  # tokens of the longest request that model, configuration and pool allow
  slab_tokens: int  # most tokens of one layer that prefill holds at once: a piece, and what came before it

  @property
  def block_bytes(self) -> int:
    return 2 * self.S * self.D * jnp.dtype(self.dtype).itemsize

  @property
  def per_pool_block_bytes(self) -> int:
    """HBM that one DRAM block id takes in digests and maps, all layers and heads."""
    return self.K * self.L * (self.E * self.D * jnp.dtype(self.dtype).itemsize + 8)

  @property
  def fixed_bytes(self) -> int:
    """HBM apart from slots and pool: tails, prefill slab (one layer's KV), digests and maps."""
    tails = self.K * self.L * self.R * self.block_bytes
    slab = self.K * -(-self.slab_tokens // self.S) * self.block_bytes
    return tails + slab + self.M * self.per_pool_block_bytes

  @classmethod
  def of(cls, model: ModelConfig, config: EngineConfig, vectors: int) -> CacheShape:
    """Divides the byte budgets of `config.cache`; `vectors` is E of the selection method, unused when dense.

    Raises:
      ValueError: a budget is below what one slot a device, or one block of a request, needs.
    """
    cache = config.cache
    limit = min(model.max_context, config.scheduler.max_context or model.max_context)
    piece = config.prefill_allowance(model.n_layers)
    slab = lambda limit: limit if piece >= limit else limit + piece  # noqa: E731
    shape = cls(
      K=model.n_kv_heads,
      L=model.n_layers,
      M=0,
      P=0,
      R=cache.rows,
      S=cache.block_tokens,
      D=model.head_dim,
      E=0 if config.sparse.policy == "dense" else vectors,
      dtype=model.dtype,
      offload=cache.offload,
      max_context=limit,
      slab_tokens=slab(limit),
    )
    in_all_layers = shape.K * shape.L * shape.block_bytes

    def with_pool(blocks: int) -> CacheShape:
      context = min(limit, blocks * shape.S)
      return dataclasses.replace(shape, M=blocks, max_context=context, slab_tokens=slab(context))

    if not cache.offload:  # the pool is what HBM has left, and the slab depends on it
      in_hbm = lambda blocks: blocks * in_all_layers + with_pool(blocks).fixed_bytes  # noqa: E731
      if in_hbm(1) > cache.hbm_bytes:
        raise ValueError(
          f"cache.hbm_bytes={cache.hbm_bytes} is below the minimum of {in_hbm(1)} bytes without offload: "
          f"{in_all_layers} for one block of a request in all layers, the rest for {shape.R} tails and the prefill slab"
        )
      return with_pool(
        bisect.bisect_right(range(cache.hbm_bytes // in_all_layers + 1), cache.hbm_bytes, key=in_hbm) - 1
      )

    blocks = cache.dram_bytes // in_all_layers
    if blocks < 1:
      raise ValueError(f"cache.dram_bytes={cache.dram_bytes} is below the {in_all_layers} bytes of one request's block")
    shape = with_pool(blocks)
    slot_bytes = (shape.block_bytes + 8) * config.tp  # a slot and its two map entries, on every device
    slots = (cache.hbm_bytes - shape.fixed_bytes) // slot_bytes * config.tp
    if slots < config.tp:
      raise ValueError(
        f"cache.hbm_bytes={cache.hbm_bytes} is below the minimum of {shape.fixed_bytes + slot_bytes} bytes: "
        f"{blocks * shape.per_pool_block_bytes} for digests and maps of {blocks} blocks, the rest for {shape.R} tails, "
        f"the prefill slab and one slot per device; lower cache.dram_bytes, cache.rows or scheduler.max_context"
      )
    return dataclasses.replace(shape, P=min(slots, blocks * shape.K * shape.L))  # more would never fill


def host_memory_kind() -> str | None:
  """The memory kind of an offloaded pool; None where host memory is no different. The one place that decides it."""
  return "pinned_host" if jax.default_backend() == "gpu" else None


def cache_specs() -> KVCache:
  """The PartitionSpec of every array of the cache: all by KV head or by slot, but for two."""
  split: Any = P("tp")
  whole: Any = P()
  return KVCache(split, split, split, residency.Maps(*[split] * 4), split, last_token=whole, clock=whole)


def cache_shardings(mesh: Mesh, offload: bool) -> KVCache:
  """The sharding of every array of the cache, with the memory kind of an offloaded pool."""
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs())
  return shardings.replace(pool=NamedSharding(mesh, P("tp"), memory_kind=host_memory_kind())) if offload else shardings


def create(shape: CacheShape, mesh: Mesh) -> KVCache:
  """An empty cache on the mesh."""
  kv = lambda *dims: jnp.zeros((*dims, 2, shape.S, shape.D), shape.dtype)  # noqa: E731
  heads = (shape.K, shape.L, shape.M)

  def empty() -> KVCache:
    return KVCache(
      pool=None,  # pyright: ignore[reportArgumentType]  made apart: it may not fit the device
      slots=kv(shape.P),
      digest=jnp.zeros((*heads, shape.E, shape.D), shape.dtype),
      maps=residency.Maps.empty(*heads, shape.P),
      tail=kv(shape.K, shape.L, shape.R),
      last_token=jnp.zeros(shape.R, jnp.int32),
      clock=jnp.zeros((), jnp.int32),
    )

  shardings = cache_shardings(mesh, shape.offload)
  cache = jax.jit(empty, out_shardings=shardings.replace(pool=None))()
  return cache.replace(pool=_create_pool(shape, shardings.pool))


def _create_pool(shape: CacheShape, sharding: Any) -> jax.Array:
  dims, dtype = (shape.K, shape.L, shape.M, 2, shape.S, shape.D), jnp.dtype(shape.dtype)
  if sharding.memory_kind != "pinned_host":
    return jax.jit(lambda: jnp.zeros(dims, dtype), out_shardings=sharding)()
  # A program would make it in device memory first, which may be smaller. These zeros are memory that the host has not
  # written yet: no second pool, and quick to copy.
  return jax.device_put(np.zeros(dims, dtype), sharding)


def working_sets(cache: KVCache, tables: jax.Array, n_blocks: jax.Array, steps: jax.Array, w: int) -> jax.Array:
  """Blocks [B] each request selected in its last `w` steps, over this device's layers and heads (SparseServe, section
  3.3).

  Args:
    cache: this device's cache.
    tables: [B, N] int32.
    n_blocks: [B] int32, full blocks of each request.
    steps: [B] int32, steps the request has made: its newest has number steps - 1.
    w: window in steps.
  """

  def one(table, n, step):
    selected = cache.maps.last_selected[:, :, table] >= step - w  # [K, L, N]
    return (selected & (jnp.arange(table.shape[0]) < n)[None, None]).sum(dtype=jnp.int32)

  return jax.lax.map(lambda row: one(*row), (tables, n_blocks, steps))
