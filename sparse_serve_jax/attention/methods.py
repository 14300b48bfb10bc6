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
import jax.numpy as jnp

from pallas_kernels import digest
from pallas_kernels.score import Linear, box, dot
from sparse_serve_jax.variants import variant

REPRESENTATIVES = 4
TOP_P = 0.85
_HIGHEST = jax.lax.Precision.HIGHEST  # as pallas_kernels.score


@dataclasses.dataclass(frozen=True)
class Method:
  """One selection method.

  Attributes:
    vectors: E, vectors of D channels in a digest.
    summarize: keys [..., S, D] of full blocks -> digests [..., E, D] of the same dtype.
    score: q [..., G, D], digests [..., N, E, D], both float32 -> [..., G, N]; higher is read first.
    budget: ranked scores [B, K, n] (descending; +inf for sinks and window, -inf for none) and length [B, K], the blocks
      that exist and, for topk, fit the token budget -> how many of the ranked ones to attend to, [B, K] int32, at most
      length. None: all of them.
    instead: of a decode step's scores [B, K, N], layer, `Rows` and S, what blocks are ranked by (`attention.drawn`).
  """

  vectors: int
  summarize: Callable[[jax.Array], jax.Array]
  score: Callable[[jax.Array, jax.Array], jax.Array]
  budget: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  instead: Callable[..., jax.Array] | None = None

  def runs_on(self, implementation: str) -> str:
    """Where digests and scores are made if `implementation` is asked for: a kernel cannot run any function."""
    return implementation if self.estimates and isinstance(self.summarize, digest.Rule) else "xla"

  @property
  def estimates(self) -> bool:
    """Whether scores are products of queries and keys, from which a block's attention mass can be estimated."""
    return isinstance(self.score, Linear)


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


def _nucleus(scores: jax.Array, length: jax.Array) -> jax.Array:
  """As few blocks as hold a share of TOP_P of the weights that the scores estimate; sinks and window besides.

  Twilight (arXiv 2502.02770, section 3): top-p over estimated attention weights, here of blocks.
  """
  forced = jnp.isposinf(scores)
  weights = jax.nn.softmax(jnp.where(forced, -jnp.inf, scores), -1)
  before = jnp.cumsum(weights, -1) - weights
  needed = forced | (before < TOP_P)
  return jnp.minimum(needed.sum(-1, dtype=jnp.int32), length)


def _arbitrary(q: jax.Array, digests: jax.Array) -> jax.Array:
  """Numbers that look random: the same for the same query and digest."""
  return jnp.sin(1e4 * _sum_of_products(q, digests))


METHODS: dict[str, Method] = {
  "cuboid_mean": Method(2, digest.cuboid_mean, box),  # ArkVale; SparseServe's and PSA's default
  "min_max": Method(2, digest.min_max, box),  # Quest
  "mean": Method(1, digest.mean, dot),
  # To compare with, in XLA only.
  "representatives": Method(REPRESENTATIVES, _representatives, _sum_of_products),  # InfLLM
  "top_p": Method(2, digest.cuboid_mean, lambda q, d: box(q, d) * q.shape[-1] ** -0.5, _nucleus),  # Twilight
  "random": Method(1, lambda keys: keys.mean(-2, keepdims=True), _arbitrary),
}
MAKERS: dict[str, Callable[[str, str], Method]] = {}  # `attention.drawn` adds those of benchmarks


def get_method(name: str, policy: str = "topk") -> Method:
  """The method of that name, or what a maker makes of what follows a colon.

  Args:
    name: in METHODS, or "held:A" or "replay:FILES" (`attention.drawn`).
    policy: sparse.policy of the lists.

  Raises:
    ValueError: there is no such method, or none for lists of that policy.
  """
  kind, _, given = name.partition(":")
  return MAKERS[kind](given, policy) if kind in MAKERS else variant(METHODS, name, "selection method")


def check_products(name: str, what: str) -> None:
  """Raises ValueError if scores of a method are no products of queries and keys, for which `what` takes them."""
  if not get_method(name).estimates:
    raise ValueError(f"{what} takes scores for products of queries and keys, and those of method {name!r} are none")
