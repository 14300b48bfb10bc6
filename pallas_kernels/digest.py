"""Digests: what selection reads instead of a block's keys. A rule is a function, keys [..., S, D] -> [..., E, D]."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton

PROGRAMS = 4096  # enough to fill every SM; more only when there are more blocks than they can take one by one
WARP_VALUES = 4096  # keys of a block in one warp's registers, 128 a thread: no reduction leaves the warp


def _cuboid_mean(keys: jax.Array) -> tuple[jax.Array, ...]:
  k = keys.astype(jnp.float32)
  centre = (k.max(-2) + k.min(-2)) / 2
  radius = jnp.abs(k - centre[..., None, :]).mean(-2)
  return centre + radius, centre - radius


def _min_max(keys: jax.Array) -> tuple[jax.Array, ...]:
  k = keys.astype(jnp.float32)
  return k.max(-2), k.min(-2)


def _mean(keys: jax.Array) -> tuple[jax.Array, ...]:
  return (keys.astype(jnp.float32).mean(-2),)


def cuboid_mean(keys: jax.Array) -> jax.Array:
  """Upper and lower corner of the centre +- mean deviation box (ArkVale, equations 3 and 4). E = 2."""
  return jnp.stack(_cuboid_mean(keys), -2).astype(keys.dtype)


def min_max(keys: jax.Array) -> jax.Array:
  """Largest and smallest value of every channel (Quest, algorithm 1). E = 2."""
  return jnp.stack(_min_max(keys), -2).astype(keys.dtype)


def mean(keys: jax.Array) -> jax.Array:
  """The mean key. E = 1."""
  return jnp.stack(_mean(keys), -2).astype(keys.dtype)


Rule = Callable[[jax.Array], jax.Array]
_VECTORS: dict[Rule, Callable[[jax.Array], tuple[jax.Array, ...]]] = {
  cuboid_mean: _cuboid_mean,
  min_max: _min_max,
  mean: _mean,
}  # a kernel cannot stack what it writes


def store_digests(
  digest: jax.Array,
  source: jax.Array,
  layer: jax.Array | int,
  source_ids: jax.Array,
  blocks: jax.Array,
  *,
  rule: Rule,
  implementation: str = "xla",
) -> jax.Array:
  """Writes the digests of finished blocks; returns `digest`, updated in place when donated.

  Args:
    digest: [K, L, M, E, D]; E = 0, nothing selects: returned as it is.
    source: [K, Ls, n_source, 2, S, D], blocks of the Ls layers that begin at `layer`; only keys are read. For a kernel
      S and D are powers of two.
    layer: scalar int32.
    source_ids: [n] int32, which of the source's blocks.
    blocks: [n] int32, distinct, DRAM block of each; -1: nothing to do.
    rule: makes the digest. A rule that is not of this file runs in XLA whatever `implementation` says.
    implementation: "xla", "triton" or "interpret".
  """
  n_heads, n_layers, _, _, size, depth = source.shape
  n = blocks.shape[0]
  if digest.shape[3] == 0 or n == 0:
    return digest
  if implementation == "xla" or rule not in _VECTORS:
    keys = source[:, :, :, 0].at[:, :, source_ids].get(mode="clip")  # [K, Ls, n, S, D]
    layers = layer + jnp.arange(n_layers, dtype=jnp.int32)[:, None]
    to = jnp.where(blocks >= 0, blocks, digest.shape[2])[None]
    return digest.at[:, layers, to].set(rule(keys), mode="drop")

  per_program = min(n, pl.next_power_of_2(pl.cdiv(n_heads * n_layers * n, PROGRAMS)))

  def kernel(layer_ref, ids_ref, blocks_ref, source_ref, _, digest_ref):
    j, k = pl.program_id(1), pl.program_id(2)
    first = pl.program_id(0) * per_program

    def one(i, _):
      block = blocks_ref[i]

      @pl.when(block >= 0)
      def _():
        for e, vector in enumerate(_VECTORS[rule](source_ref[k, j, ids_ref[i], 0])):
          digest_ref[k, layer_ref[0] + j, block, e] = vector.astype(digest.dtype)

    jax.lax.fori_loop(first, jnp.minimum(first + per_program, n), one, None)

  return triton.call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(digest.shape, digest.dtype),
    grid=(pl.cdiv(n, per_program), n_layers, n_heads),
    input_output_aliases={4: 0},
    interpret=implementation == "interpret",
    num_warps=min(8, pl.next_power_of_2(pl.cdiv(size * depth, WARP_VALUES))),
    name="store_digests",
  )(jnp.reshape(layer, 1).astype(jnp.int32), source_ids, blocks, source, digest)
