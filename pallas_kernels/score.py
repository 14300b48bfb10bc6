"""Scores: every block's digest against the query, read through the block tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels import triton

NUM_WARPS = 4
TILE_BYTES = 8 << 10  # of digests that a program sums: 64 bytes of each of its 128 threads
PRODUCT_BYTES = 32 << 10  # at most, of digests that a program takes as a matrix
PRODUCT_BLOCKS = 64  # at most: rows of the smallest product that a group of four warps makes on Hopper
LOWEST = float(np.finfo(np.float32).min)  # the largest score of no blocks; finite, so that differences are numbers

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Linear:
  """A rule that is linear in the digest, which kernels run too: score = sum_e weight(q, e) . digest_e.

  The mean over query heads is then linear as well: one weight vector for all of them.

  `weight(q, e)` is elementwise. XLA gives it q [..., D] and one e after the other; a kernel both along [E * D], the
  query repeated for each vector. So `if e == 0` fails there: write `jnp.where(e == 0, ...)`.
  """

  vectors: int  # E
  weight: Callable[[jax.Array, jax.Array | int], jax.Array]
  exact: bool = False  # a weight is a value of q, its negative or 0, so that it loses nothing in the dtype of q

  def __call__(self, q: jax.Array, digests: jax.Array) -> jax.Array:
    """q [..., G, D], digests [..., N, E, D], both float32 -> [..., G, N]."""
    return self._products(lambda e: self.weight(q, e), digests)

  def mean(self, q: jax.Array, digests: jax.Array) -> jax.Array:
    """q [..., T, G, D], digests [..., N, E, D], both float32 -> [..., T, N], the mean over G."""
    return self._products(lambda e: self.weight(q, e).mean(-2), digests)

  def _products(self, weights: Callable[[int], jax.Array], digests: jax.Array) -> jax.Array:
    def product(e):
      return jnp.einsum("...gd,...nd->...gn", weights(e), digests[..., e, :], precision=_HIGHEST)

    return sum(product(e) for e in range(self.vectors))  # pyright: ignore[reportReturnType]  there is a first


# sum_d max(q_d upper_d, q_d lower_d): the largest dot product with a key of the box (Quest, ArkVale), as q+ u + q- l.
box = Linear(2, lambda q, e: jnp.where(e == 0, jnp.maximum(q, 0), jnp.minimum(q, 0)), exact=True)
# The dot product with the one vector of the digest.
dot = Linear(1, lambda q, e: q, exact=True)


REDUCTIONS = {  # what the scores of a KV head's query heads become
  "mean": "their mean",
  "max": "the largest",
  "softmax": "the log of the mean share, where the scores of a query head are logits of the blocks that are ranked",
}


@dataclasses.dataclass(frozen=True)
class Ranking:
  """How blocks are ranked. A `reduce` that there is not is a ValueError."""

  # q [..., G, D], digests [..., N, E, D], both float32 -> [..., G, N]: for a kernel a `Linear`, for XLA any function.
  rule: Callable[[jax.Array, jax.Array], jax.Array]
  reduce: str = "mean"  # a name in REDUCTIONS, over the G query heads of a KV head
  sinks: int = 0  # the first blocks, forced: attended whatever their score, which is +inf
  window: int = 0  # likewise the last full blocks

  def __post_init__(self):
    if self.reduce not in REDUCTIONS:
      raise ValueError(f"reduce={self.reduce!r} is none of {', '.join(REDUCTIONS)}")

  def forced(self, block: Int32[Array, "*#b"], n_blocks: Int32[Array, "*#b"]) -> Bool[Array, "*any"]:
    """Whether the `block`s, by their places in a row of `n_blocks`, are sinks or in the window."""
    return (block < self.sinks) | (block >= n_blocks - self.window)


def across_heads(
  by_head: Float32[Array, "*b G N"], ranked: Bool[Array, "*#b N"], depth: int, reduce: str
) -> Float32[Array, "*b N"]:
  """One score of each block from those of G query heads of D = `depth` channels; `reduce` is a name in REDUCTIONS.

  Where a block is not `ranked` it is any number.
  """
  if reduce != "softmax":
    return by_head.max(-2) if reduce == "max" else by_head.mean(-2)
  # Logs, as shares below 1e-38 would all be equal.
  logits = jnp.where(ranked[..., None, :], by_head * depth**-0.5, -jnp.inf)
  return jax.nn.logsumexp(jax.nn.log_softmax(logits, -1), -2)


def tile_scores(
  rule: Callable[[jax.Array, jax.Array], jax.Array],
  q: Float32[Array, "K T G D"],
  digests: Float32[Array, "K N E D"],
  reduce: str,
) -> Float32[Array, "K T N"]:
  """Scores of all blocks for the mean queries of T tiles, by XLA.

  Args:
    rule: as in `Ranking`.
    q: mean queries of the tiles, of each of the G query heads of a KV head.
    digests: of the N blocks.
    reduce: "max": the largest of the G scores. Else their mean, for which a `Linear` rule takes one product of all G.
  """
  if reduce != "max" and isinstance(rule, Linear):
    return rule.mean(q, digests)
  by_head = rule(q.reshape(q.shape[0], -1, q.shape[-1]), digests).reshape(*q.shape[:-1], -1)
  return by_head.max(2) if reduce == "max" else by_head.mean(2)


def score(
  q: Float[Array, "B K G D"],
  digest: Float[Array, "K L M E D"],
  layer: Int32[Array, ""] | int,
  tables: Int32[Array, "B N"],
  n_blocks: Int32[Array, " B"],
  ranking: Ranking,
  *,
  implementation: str = "xla",
) -> Float32[Array, "B K N"]:
  """Scores of all blocks of all rows.

  Args:
    q: the queries.
    digest: `layer` of it is read at `tables`.
    layer: of the digests.
    tables: DRAM block of every logical block; entries at and beyond `n_blocks` are not used.
    n_blocks: full blocks of a row.
    ranking: the rule, and what is forced.
    implementation: "xla", "triton" or "interpret".

  Returns:
    -inf for blocks that do not exist.

  Raises:
    ValueError: the digests have not the E vectors that a `Linear` rule reads.
    NotImplementedError: a kernel was asked for, and the rule is not `Linear`, or E or D not a power of two.
  """
  triton.check(implementation, E=digest.shape[3], D=digest.shape[4])
  rule = ranking.rule
  if isinstance(rule, Linear) and digest.shape[3] != rule.vectors:
    raise ValueError(f"the rule reads {rule.vectors} vectors of a digest, and these have {digest.shape[3]}")
  if implementation != "xla":
    if not isinstance(rule, Linear):
      raise NotImplementedError(f"a kernel runs a score.Linear rule, not {rule}; use implementation='xla'")
    return _score_kernel(q, digest, layer, tables, n_blocks, ranking, implementation)
  k = jnp.arange(digest.shape[0])[None, :, None]
  gathered = digest[k, layer, tables[:, None, :]].astype(jnp.float32)  # [B, K, N, E, D]
  by_head = rule(q.astype(jnp.float32), gathered)  # [B, K, G, N]
  block, last = jnp.arange(tables.shape[1])[None], n_blocks[:, None]
  exists, forced = block < last, ranking.forced(block, last)
  scores = across_heads(by_head, (exists & ~forced)[:, None], q.shape[-1], ranking.reduce)
  return jnp.where(exists[:, None], jnp.where(forced[:, None], jnp.inf, scores), -jnp.inf)


def _score_kernel(q, digest, layer, tables, n_blocks, ranking, implementation):
  (n_rows, n_heads, n_group, depth), rule, n = q.shape, ranking.rule, tables.shape[1]
  width = rule.vectors * depth  # a digest's E vectors, contiguous
  dtype = digest.dtype if rule.exact and q.dtype == digest.dtype else jnp.dtype(jnp.float32)  # of a matrix product
  if ranking.reduce == "mean":
    tile = min(pl.next_power_of_2(n), max(1, TILE_BYTES // (width * digest.dtype.itemsize)))
  else:
    tile = min(PRODUCT_BLOCKS, max(triton.LEAST_TILE, PRODUCT_BYTES // (width * dtype.itemsize)))

  def float32(*shape):
    return jax.ShapeDtypeStruct((n_rows, n_heads, *shape), jnp.float32)

  shares, n_tiles = ranking.reduce == "softmax", pl.cdiv(n, tile)
  scores = triton.call(
    functools.partial(_kernel, ranking, tile, dtype),
    out_shape=(float32(n_group, n), *[float32(n_group, n_tiles)] * 2) if shares else float32(n),
    grid=(n_tiles, n_heads, n_rows),
    implementation=implementation,
    num_warps=NUM_WARPS,
    name="score",
  )(jnp.reshape(layer, 1), tables, n_blocks, q, digest.reshape(*digest.shape[:3], width))
  return _shares(*scores) if shares else scores


def _kernel(
  ranking: Ranking,
  tile: int,
  dtype: np.dtype,
  layer_ref,  # [1]
  tables_ref,  # [B, N]
  n_blocks_ref,  # [B]
  q_ref,  # [B, K, G, D]
  digest_ref,  # [K, L, M, E * D]
  scores_ref,  # [B, K, N], or for shares [B, K, G, N]: scaled products
  *sums_refs,  # for shares, [B, K, G, tiles]: the largest product of a tile and the sum of exp(product - largest)
):
  """One tile of a row's blocks against all query heads of one KV head, as a matrix product in `dtype`.

  For the mean there is one weight vector, by which digests are multiplied. Shares of a head need its products of all
  tiles, so they are made afterwards.
  """
  (n_group, depth), width, n = q_ref.shape[2:], digest_ref.shape[3], tables_ref.shape[1]
  t, k, b = (pl.program_id(axis) for axis in range(3))
  start, last = t * tile, n_blocks_ref[b]
  i = start + jnp.arange(tile)
  exists = i < last
  scored, instead = exists & ~ranking.forced(i, last), jnp.where(exists, jnp.inf, -jnp.inf)
  head = jnp.arange(max(triton.LEAST_TILE, pl.next_power_of_2(n_group)))
  if ranking.reduce == "mean":
    channel = jnp.arange(width)
    queries = (q_ref[b, k, g, channel & (depth - 1)].astype(jnp.float32) for g in range(n_group))
    weights = [ranking.rule.weight(query, channel // depth)[None] for query in queries]  # G times [1, E * D]

  def digests():  # [tile, E * D]
    block = jnp.where(scored, tables_ref[b, jnp.minimum(i, n - 1)], 0)  # 0: any that can be read
    return digest_ref[k, layer_ref[0], block]

  def mean():  # [tile]
    return jnp.sum(digests().astype(jnp.float32) * (sum(weights) / n_group), 1)

  def by_head():  # [tile, heads]
    channel, depths = jnp.arange(width)[None], jnp.full((1, width), depth)
    of_head = jnp.minimum(head, n_group - 1)[:, None]  # the last head stands in for those that pad
    queries = q_ref[b, k, of_head, jax.lax.rem(channel, depths)]  # [heads, E * D]; by `&` the loads would be narrow
    vectors = digests().astype(dtype)  # on their way while the weights are made
    weights = ranking.rule.weight(queries.astype(jnp.float32), jax.lax.div(channel, depths))
    return triton.dot(vectors, weights.astype(dtype), trans_b=True)

  def products(make, *shape):
    ranked = (start < last - ranking.window) & (start + tile > ranking.sinks)  # else no block needs its digest
    return jax.lax.cond(ranked, make, lambda: jnp.zeros(shape, jnp.float32))

  if ranking.reduce != "softmax":
    scores = products(mean if ranking.reduce == "mean" else lambda: by_head().max(1), tile)
    return triton.store(scores_ref.at[b, k, i], jnp.where(scored, scores, instead), mask=i < n)
  scores, counted, real = products(by_head, tile, *head.shape) * depth**-0.5, scored[:, None], head < n_group
  high = jnp.where(counted, scores, LOWEST).max(0)  # [heads]
  mass = jnp.where(counted, jnp.exp(scores - high[None]), 0.0).sum(0)
  for ref, value in zip(sums_refs, (high, mass), strict=True):
    triton.store(ref.at[b, k, head, t], value, mask=real)
  scores, there = jnp.where(counted, scores, instead[:, None]), (i < n)[:, None] & real[None]
  triton.store(scores_ref.at[b, k, head[None], i[:, None]], scores, mask=there)


def _shares(
  products: Float32[Array, "B K G N"], high: Float32[Array, "B K G tiles"], mass: Float32[Array, "B K G tiles"]
) -> Float32[Array, "B K N"]:
  """The log of the sum of shares from what the kernel writes: one reduction, then one elementwise pass.

  Query head by query head, so that XLA fuses the pass into one kernel.
  """

  def merge(a, b):
    high = jnp.maximum(a[0], b[0])
    return high, a[1] * jnp.exp(a[0] - high) + b[1] * jnp.exp(b[0] - high)

  high, mass = jax.lax.reduce((high, mass), (np.float32(LOWEST), np.float32(0)), merge, (3,))
  log_mass = jnp.log(mass)
  by_head = (products[:, :, g] - high[:, :, g, None] - log_mass[:, :, g, None] for g in range(products.shape[2]))
  shares = functools.reduce(jnp.logaddexp, by_head)  # [B, K, N]
  return jnp.where(jnp.isinf(products[:, :, 0]), products[:, :, 0], shares)  # what is infinite has no share
