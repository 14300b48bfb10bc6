"""Partial softmax results as values, and the one function that merges them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

_HIGHEST = jax.lax.Precision.HIGHEST


class Partial(NamedTuple):
  """Attention over part of the keys, not yet normalised.

  o = sum_j exp(s_j - m) v_j, m = max_j s_j, l = sum_j exp(s_j - m).
  Over no keys at all: o = 0, m = -inf, l = 0.
  """

  o: Float32[Array, "*any D"]
  m: Float32[Array, "*any"]
  l: Float32[Array, "*any"]

  @property
  def lse(self) -> Float32[Array, "*any"]:
    """log of the summed mass sum_j exp(s_j); -inf where there were no keys."""
    return self.m + jnp.log(self.l)

  @property
  def output(self) -> Float32[Array, "*any D"]:
    """The attention output; 0 where there were no keys."""
    return self.o / jnp.where(self.l == 0, 1.0, self.l)[..., None]


def merge(a: Partial, b: Partial) -> Partial:
  """The partial result over the union of the disjoint sets of keys of `a` and `b`."""
  m = jnp.maximum(a.m, b.m)
  reference = jnp.where(m == -jnp.inf, 0.0, m)  # -inf - -inf would be NaN
  wa, wb = jnp.exp(a.m - reference), jnp.exp(b.m - reference)
  return Partial(a.o * wa[..., None] + b.o * wb[..., None], m, a.l * wa + b.l * wb)


def merge_along(parts: Partial, axis: int) -> Partial:
  """Merges partial results of disjoint sets of keys: those of `parts` along `axis`, which is one of `m` and `l`."""
  m = parts.m.max(axis)
  reference = jnp.where(m == -jnp.inf, 0.0, m)
  weight = jnp.exp(parts.m - jnp.expand_dims(reference, axis))
  return Partial((parts.o * weight[..., None]).sum(axis), m, (parts.l * weight).sum(axis))


def partial_attention(
  q: Float[Array, "*q G D"],
  k: Float[Array, "*rows T D"],
  v: Float[Array, "*rows T D"],
  valid: Bool[Array, "*rows T"],
  scale: float,
) -> Partial:
  """Attention of q over k and v where `valid`; what is masked may hold NaN. Leading axes broadcast."""
  # bf16 products are exact in float32, so this is what a tensor core accumulates.
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  s = jnp.einsum("...gd,...td->...gt", q, k, precision=_HIGHEST) * scale
  s = jnp.where(valid[..., None, :], s, -jnp.inf)
  m = s.max(-1)
  p = jnp.exp(s - jnp.where(m == -jnp.inf, 0.0, m)[..., None])
  v = jnp.where(valid[..., None], v, 0.0)  # 0 * NaN is NaN
  return Partial(jnp.einsum("...gt,...td->...gd", p, v, precision=_HIGHEST), m, p.sum(-1))
