"""Selection methods to compare with: those of other papers, and one that is no better than chance.

Importing this adds them to `attention.methods.METHODS`, so that configurations can name them; they run in XLA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.digest import cuboid_mean
from pallas_kernels.score import box
from sparse_serve_jax.attention.methods import METHODS, Method

REPRESENTATIVES = 4
TOP_P = 0.85
_HIGHEST = jax.lax.Precision.HIGHEST  # as pallas_kernels.score


def _representatives(keys: jax.Array) -> jax.Array:
  """The keys [..., S, D] that their block's keys agree with most, [..., 4, D].

  InfLLM (arXiv 2402.04617, section 3.2) takes the keys that the queries nearby attend to most; a digest is made of keys
  alone, so they stand in for those queries.
  """
  whole = keys.astype(jnp.float32)
  agreement = jnp.einsum("...sd,...td->...s", whole, whole, precision=_HIGHEST)
  best = jax.lax.top_k(agreement, min(REPRESENTATIVES, keys.shape[-2]))[1]
  return jnp.take_along_axis(keys, best[..., None], -2)


def _sum_of_products(q: jax.Array, digests: jax.Array) -> jax.Array:
  return jnp.einsum("...gd,...ned->...gn", q, digests, precision=_HIGHEST)


def _scaled_box(q: jax.Array, digests: jax.Array) -> jax.Array:
  return box(q, digests) * q.shape[-1] ** -0.5


def _nucleus(scores: jax.Array, count: jax.Array) -> jax.Array:
  """As few blocks as hold a share of TOP_P of the weights that the scores estimate; sinks and window besides.

  Twilight (arXiv 2502.02770, section 3): top-p over estimated attention weights, here of blocks.
  """
  always = jnp.isposinf(scores)
  weights = jax.nn.softmax(jnp.where(always, -jnp.inf, scores), -1)
  before = jnp.cumsum(weights, -1) - weights
  needed = always | (before < TOP_P)
  return jnp.minimum(needed.sum(-1, dtype=jnp.int32), count)


def _arbitrary(q: jax.Array, digests: jax.Array) -> jax.Array:
  """Numbers that look random: the same for the same query and digest."""
  return jnp.sin(1e4 * _sum_of_products(q, digests))


METHODS |= {
  "representatives": Method(REPRESENTATIVES, _representatives, _sum_of_products),  # InfLLM
  "top_p": Method(2, cuboid_mean, _scaled_box, _nucleus),  # Twilight
  "random": Method(1, lambda keys: keys.mean(-2, keepdims=True), _arbitrary),
}
