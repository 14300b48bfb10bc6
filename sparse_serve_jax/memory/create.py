"""An empty cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels import Maps
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.kv_cache import Hot, KVCache, cache_shardings
from sparse_serve_jax.memory.pinned import pinned_array
from sparse_serve_jax.memory.shape import CacheShape


def create(shape: CacheShape, mesh: Mesh, pool: jax.Array | None = None) -> KVCache:
  """An empty cache on a mesh, or around a given pool.

  Raises:
    MemoryError: the host has not enough pinned memory for the pool.
  """
  shardings = cache_shardings(mesh, shape.offload)
  if pool is None:
    pool = _create_pool(shape.pool_shape, shape.dtype, shardings.pool)
  return KVCache(pool, jax.jit(functools.partial(empty_hot, shape), out_shardings=shardings.hot)())


def empty_hot(shape: CacheShape) -> Hot:
  """No request has a lane, and no block is in a slot."""
  heads, block = (shape.K, shape.L, shape.M), shape.layout.shape
  return Hot(
    slots=jnp.zeros((shape.P, *block), shape.dtype),
    digest=jnp.zeros((*heads, shape.E, shape.D), shape.dtype),
    maps=Maps.empty(*heads, shape.P),
    tail=jnp.zeros((shape.K, shape.L, shape.R, *block), shape.dtype),
    tables=jnp.full((shape.R, shape.N), -1, jnp.int32),
    last_token=jnp.zeros(shape.R, jnp.int32),
    clock=jnp.zeros((), jnp.int32),
  )


def _create_pool(dims: tuple[int, ...], dtype: str, sharding: Any) -> jax.Array:
  """A pool whose values may be anything: a block is written before it is read."""
  if sharding.memory_kind != host_pool.PINNED:
    return jax.jit(lambda: jnp.zeros(dims, dtype), out_shardings=sharding)()
  # A program would make it in device memory first, which may be smaller.
  shards = [pinned_array(sharding.shard_shape(dims), dtype, device) for device in sharding.addressable_devices]
  return jax.make_array_from_single_device_arrays(dims, sharding, shards)
