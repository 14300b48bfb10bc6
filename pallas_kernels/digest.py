"""Digests: what selection reads instead of a block's keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels import triton

PROGRAMS = 4096  # enough to fill every SM; more only when there are more blocks than they can take one by one
WARP_VALUES = 4096  # keys of a block in one warp's registers, 128 a thread: no reduction leaves the warp


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule that kernels run too: keys [..., S, D] in float32 -> the E vectors [..., D] of their digest.

  `vectors` is made of elementwise functions and reductions over S: a kernel has no slices, sorts or medians.
  """

  vectors: Callable[[jax.Array], tuple[jax.Array, ...]]  # a tuple, since a kernel cannot stack what it writes

  def __call__(self, keys: jax.Array) -> jax.Array:
    """Digests [..., E, D] of keys [..., S, D], of the same dtype. Raises ValueError if `vectors` makes no tuple."""
    vectors = self.vectors(keys.astype(jnp.float32))
    if not isinstance(vectors, tuple):
      raise ValueError(f"Rule.vectors returns a tuple of E vectors, not a {type(vectors).__name__}")
    return jnp.stack(vectors, -2).astype(keys.dtype)


def _cuboid_mean(keys: jax.Array) -> tuple[jax.Array, ...]:
  centre = (keys.max(-2) + keys.min(-2)) / 2
  radius = jnp.abs(keys - centre[..., None, :]).mean(-2)
  return centre + radius, centre - radius


# Upper and lower corner of the centre +- mean deviation box (ArkVale, equations 3 and 4). E = 2.
cuboid_mean = Rule(_cuboid_mean)
# Largest and smallest value of every channel (Quest, algorithm 1). E = 2.
min_max = Rule(lambda keys: (keys.max(-2), keys.min(-2)))
# The mean key. E = 1.
mean = Rule(lambda keys: (keys.mean(-2),))


def store_digests(
  digest: Float[Array, "K L M E D"],
  source: Float[Array, "K Ls n_source 2 S D"],
  layer: Int32[Array, ""] | int,
  source_ids: Int32[Array, " n"],
  blocks: Int32[Array, " n"],
  *,
  rule: Callable[[jax.Array], jax.Array],
  implementation: str = "xla",
) -> Float[Array, "K L M E D"]:
  """Writes the digests of finished blocks; returns `digest`, updated in place when donated.

  Args:
    digest: E = 0, nothing selects: returned as it is.
    source: blocks of the Ls layers that begin at `layer`; only keys are read.
    layer: the first one.
    source_ids: which of the source's blocks.
    blocks: distinct, DRAM block of each; -1: nothing to do.
    rule: keys [..., S, D] -> digests [..., E, D]: for a kernel a `Rule`, for XLA any function.
    implementation: "xla", "triton" or "interpret".

  Raises:
    ValueError: the rule makes other digests than `digest` holds, or `Rule.vectors` no tuple.
    NotImplementedError: a kernel was asked for, and the rule is no `Rule`, or S or D is not a power of two.
  """
  n_heads, n_layers, _, _, size, depth = source.shape
  n = blocks.shape[0]
  triton.check(implementation, S=size, D=depth)
  if digest.shape[3] == 0:
    return digest
  made = jax.eval_shape(rule, jax.ShapeDtypeStruct((size, depth), source.dtype)).shape
  if made != digest.shape[3:]:
    raise ValueError(f"the rule makes a digest {list(made)} of a block, and these are {list(digest.shape[3:])}")
  if n == 0:
    return digest
  if implementation == "xla":
    keys = source[:, :, :, 0].at[:, :, source_ids].get(mode="clip")  # [K, Ls, n, S, D]
    layers = layer + jnp.arange(n_layers, dtype=jnp.int32)[:, None]
    to = jnp.where(blocks >= 0, blocks, digest.shape[2])[None]
    return digest.at[:, layers, to].set(rule(keys), mode="drop")

  if not isinstance(rule, Rule):
    raise NotImplementedError(f"a kernel runs a digest.Rule, not {rule}; use implementation='xla'")
  per_program = min(n, pl.next_power_of_2(pl.cdiv(n_heads * n_layers * n, PROGRAMS)))
  return triton.call(
    functools.partial(_store, rule, per_program),
    out_shape=jax.ShapeDtypeStruct(digest.shape, digest.dtype),
    grid=(pl.cdiv(n, per_program), n_layers, n_heads),
    input_output_aliases={4: 0},
    implementation=implementation,
    num_warps=min(8, pl.next_power_of_2(pl.cdiv(size * depth, WARP_VALUES))),
    name="store_digests",
  )(jnp.reshape(layer, 1).astype(jnp.int32), source_ids, blocks, source, digest)


def _store(
  rule: Rule,
  per_program: int,
  layer_ref,  # [1]
  ids_ref,  # [n]
  blocks_ref,  # [n]
  source_ref,  # [K, Ls, n_source, 2, S, D]
  _,  # digest_ref: one memory
  digest_ref,  # [K, L, M, E, D]
):
  """The digests of `per_program` blocks of one layer and head."""
  n, j, k = blocks_ref.shape[0], pl.program_id(1), pl.program_id(2)
  first = pl.program_id(0) * per_program

  def one(i, _):
    block = blocks_ref[i]

    @pl.when(block >= 0)
    def _():
      for e, vector in enumerate(rule.vectors(source_ref[k, j, ids_ref[i], 0].astype(jnp.float32))):
        digest_ref[k, layer_ref[0] + j, block, e] = vector.astype(digest_ref.dtype)

  jax.lax.fori_loop(first, jnp.minimum(first + per_program, n), one, None)
