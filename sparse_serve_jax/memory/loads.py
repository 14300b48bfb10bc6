"""How blocks that miss come from the pool, between finding them and attending to them.

A load is one function

  (pool, slots, layer, located, implementation) -> (slots, located, copied)

It copies what it wants of the misses of `located` into their places in `slots` and returns `located` with these as
hits that keep their places (`kernels.commit` knows them by that, whether attention comes to read them or not), and how
many blocks it copied of each list, [B, K] int32. Attention then reads every block that still misses from the pool, and
copies it to its place in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import pallas_kernels as kernels

Load = Callable[[jax.Array, jax.Array, jax.Array, kernels.Located, str], tuple[jax.Array, kernels.Located, jax.Array]]


def fused(
  pool: Float[Array, "K L M 2 S D"],
  slots: Float[Array, "P 2 S D"],
  layer: Int32[Array, ""],
  located: kernels.Located,
  implementation: str,
) -> tuple[Float[Array, "P 2 S D"], kernels.Located, Int32[Array, "B K"]]:
  """Leaves all misses to attention: a block is read from the pool where it is needed, and once."""
  del pool, layer, implementation
  return slots, located, jnp.zeros_like(located.length)


LOADS: dict[str, Load] = {"fused": fused}
