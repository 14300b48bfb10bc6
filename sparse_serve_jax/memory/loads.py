"""How blocks that miss come from the pool, between finding them and attending to them.

A load is one function

  (pool, hot, layer, located, implementation) -> (slots, located, copied)

It copies what it wants of the misses of `located` into their places in `hot.slots` and returns `located` with these as
hits that keep their places (`kernels.commit` knows them by that, whether attention comes to read them or not), and how
many blocks it copied of each list, [B, K] int32. Attention then reads every block that still misses from the pool, and
copies it to its place in the same pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

import pallas_kernels as kernels
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.kv_cache import Hot

Load = Callable[[jax.Array, Hot, jax.Array, kernels.Located, str], tuple[jax.Array, kernels.Located, jax.Array]]
# Blocks that a staging buffer holds: the smallest that holds all there are is sent. A callback's operands must be
# small: above 100 KiB JAX copies them by the threads of a CPU's backend, which may all be waiting in callbacks.
STAGED = (1024, 256, 64)


def fused(
  pool: Float[Array, "K L M 2 S D"],
  hot: Hot,
  layer: Int32[Array, ""],
  located: kernels.Located,
  implementation: str,
) -> tuple[Float[Array, "P 2 S D"], kernels.Located, Int32[Array, "B K"]]:
  """Leaves all misses to attention: a block is read from the pool where it is needed, and once."""
  del pool, layer, implementation
  return hot.slots, located, jnp.zeros_like(located.length)


def _ahead(copy: Callable[..., jax.Array]) -> Load:
  """A load that copies all misses that have a place, by copy(pool, hot, layer, blocks, place, implementation)."""

  def load(pool, hot, layer, located, implementation):
    if hot.slots.shape[0] == 0:
      return fused(pool, hot, layer, located, implementation)
    wanted = ~located.hit & (located.blocks >= 0) & (located.place >= 0)
    blocks, place = (jnp.where(wanted, x, -1) for x in (located.blocks, located.place))
    slots = copy(pool, hot, layer, blocks, place, implementation)
    return slots, kernels.arrived(located, place), wanted.sum(-1, dtype=jnp.int32)

  return load


def _gather(pool, hot, layer, blocks, place, implementation) -> jax.Array:
  """One kernel copies them all (FlashH2D: SparseServe, section 3.2)."""
  return kernels.load_blocks(pool, hot.slots, layer, blocks, place, implementation=implementation)


def _per_block(pool, hot, layer, blocks, place, implementation) -> jax.Array:
  """One copy a block, one after the other, as the papers' baselines do."""
  return kernels.load_each(pool, hot.slots, layer, blocks, place, implementation=implementation)


def _staged(pool, hot, layer, blocks, place, implementation) -> jax.Array:
  """Threads of the host gather them in a buffer, one copy brings it to the device, a kernel puts them into slots.

  The host reads the pool while a program runs. No program that loads writes it before its last layer has attended, and
  the programs before it have ended.
  """
  if hot.pool_id is None:
    raise ValueError("the load 'staged' reads the pool on the host, and this cache has no `pool_id`")
  (n_heads, n_layers, n_pool), block = pool.shape[:3], pool.shape[3:]
  head = jnp.arange(n_heads, dtype=jnp.int32)[None, :, None]
  at, count = kernels.compact((blocks >= 0).ravel())
  ids = jnp.pad(((head * n_layers + layer) * n_pool + blocks).ravel().at[at].get(mode="clip"), (0, STAGED[0]))
  to = jnp.pad(place.ravel().at[at].get(mode="fill", fill_value=-1), (0, STAGED[0]), constant_values=-1)

  def read(number, ids, left):
    n = min(int(left), len(ids))
    return host_pool.gather(int(number[0]), np.asarray(ids)[:n], len(ids)).view(pool.dtype).reshape(-1, *block)

  def bring(n, state):
    start, slots = state
    some, slot = (jax.lax.dynamic_slice_in_dim(x, start, n) for x in (ids, to))
    result = jax.ShapeDtypeStruct((n, *block), pool.dtype)
    staging = jax.pure_callback(lambda *x: read(*map(np.asarray, x)), result, hot.pool_id, some, count - start)
    every = jnp.arange(n, dtype=jnp.int32)
    slots = kernels.place_blocks(slots, staging[None, None], every, slot[None, None], implementation=implementation)
    return start + n, slots

  state = jnp.int32(0), hot.slots
  for n, fewer in itertools.pairwise((*STAGED, 0)):
    state = jax.lax.while_loop(lambda state, fewer=fewer: count - state[0] > fewer, functools.partial(bring, n), state)
  return state[1]


LOADS: dict[str, Load] = {
  "fused": fused,
  "gather": _ahead(_gather),
  "staged": _ahead(_staged),
  "per_block": _ahead(_per_block),
}
