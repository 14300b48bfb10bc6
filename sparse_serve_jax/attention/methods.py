"""Selection methods: how a block is summarised, how a summary is scored, how many of the ranked blocks are attended.

A method is three pure functions in jnp, so it runs on any backend. To add one:

  METHODS["top_channel"] = Method(
    vectors=1,
    summarize=lambda keys: jnp.abs(keys).max(-2, keepdims=True),
    score=lambda q, digests: jnp.einsum("...gd,...nd->...gn", jnp.abs(q), digests[..., 0, :]),
  )
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from pallas_kernels import digest
from pallas_kernels.score import Linear, box, dot


def whole_budget(scores: jax.Array, count: jax.Array) -> jax.Array:
  """Attends to every block the token budget has room for."""
  del scores
  return count


@dataclasses.dataclass(frozen=True)
class Method:
  """One selection method.

  Attributes:
    vectors: E, vectors of D channels in a digest.
    summarize: keys [..., S, D] of full blocks -> digests [..., E, D] of the same dtype.
    score: q [..., G, D], digests [..., N, E, D], both float32 -> [..., G, N]; higher is read first.
    budget: ranked scores [B, K, n] (descending; +inf for sinks and window, -inf for none) and count [B, K], the blocks
      that exist and, for topk, fit the token budget -> how many of the ranked ones to attend to, [B, K] int32, at most
      count.
  """

  vectors: int
  summarize: Callable[[jax.Array], jax.Array]
  score: Callable[[jax.Array, jax.Array], jax.Array]
  budget: Callable[[jax.Array, jax.Array], jax.Array] = whole_budget

  def runs_on(self, implementation: str) -> str:
    """Where digests and scores are made if `implementation` is asked for: a kernel cannot run any function."""
    in_kernels = isinstance(self.summarize, digest.Rule) and isinstance(self.score, Linear)
    return implementation if in_kernels else "xla"


METHODS: dict[str, Method] = {
  "cuboid_mean": Method(2, digest.cuboid_mean, box),  # ArkVale; SparseServe's and PSA's default
  "min_max": Method(2, digest.min_max, box),  # Quest
  "mean": Method(1, digest.mean, dot),
}


def get_method(name: str) -> Method:
  """The method of that name.

  Raises:
    ValueError: there is none; the message lists those there are.
  """
  if name not in METHODS:
    raise ValueError(f"unknown selection method {name!r}; known: {', '.join(sorted(METHODS))}")
  return METHODS[name]
