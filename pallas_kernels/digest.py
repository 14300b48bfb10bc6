"""Digests: what selection reads instead of a block's keys. A rule is a function, keys [..., S, D] -> [..., E, D]."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cuboid_mean(keys: jax.Array) -> jax.Array:
  """Upper and lower corner of the centre +- mean deviation box (ArkVale, equations 3 and 4). E = 2."""
  k = keys.astype(jnp.float32)
  centre = (k.max(-2) + k.min(-2)) / 2
  radius = jnp.abs(k - centre[..., None, :]).mean(-2)
  return jnp.stack([centre + radius, centre - radius], -2).astype(keys.dtype)


def min_max(keys: jax.Array) -> jax.Array:
  """Largest and smallest value of every channel (Quest, algorithm 1). E = 2."""
  return jnp.stack([keys.max(-2), keys.min(-2)], -2)


def mean(keys: jax.Array) -> jax.Array:
  """The mean key. E = 1."""
  return keys.astype(jnp.float32).mean(-2, keepdims=True).astype(keys.dtype)
