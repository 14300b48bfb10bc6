"""Scores: every block's digest against the query, read through the block tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels import triton

TILE_BYTES = 8 << 10  # of digests a program reads: 64 bytes of each of its 128 threads
NUM_WARPS = 4

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Linear:
  """A rule that is linear in the digest, which kernels run too: score = sum_e weight(q, e) . digest_e.

  The mean over query heads is then linear as well: one weight vector for all of them.

  `weight(q, e)` is elementwise. XLA gives it q [..., D] and one e after the other; a kernel both as [E * D], the query
  repeated for each vector. So `if e == 0` fails there: write `jnp.where(e == 0, ...)`.
  """

  vectors: int  # E
  weight: Callable[[jax.Array, jax.Array | int], jax.Array]

  def __call__(self, q: jax.Array, digests: jax.Array) -> jax.Array:
    """q [..., G, D], digests [..., N, E, D], both float32 -> [..., G, N]."""

    def product(e):
      return jnp.einsum("...gd,...nd->...gn", self.weight(q, e), digests[..., e, :], precision=_HIGHEST)

    return sum(product(e) for e in range(self.vectors))  # pyright: ignore[reportReturnType]  there is a first


# sum_d max(q_d upper_d, q_d lower_d): the largest dot product with a key of the box (Quest, ArkVale), as q+ u + q- l.
box = Linear(2, lambda q, e: jnp.where(e == 0, jnp.maximum(q, 0), jnp.minimum(q, 0)))
# The dot product with the one vector of the digest.
dot = Linear(1, lambda q, e: q)


REDUCTIONS = {  # what the scores of a KV head's query heads become
  "mean": "their mean",
  "max": "the largest",
  "softmax": "the log of the mean share, where the scores of a query head are logits of the blocks that are ranked",
}


@dataclasses.dataclass(frozen=True)
class Ranking:
  """How blocks are ranked."""

  # q [..., G, D], digests [..., N, E, D], both float32 -> [..., G, N]: for a kernel a `Linear`, for XLA any function.
  rule: Callable[[jax.Array, jax.Array], jax.Array]
  reduce: str = "mean"  # a name in REDUCTIONS, over the G query heads of a KV head
  sinks: int = 0  # the first blocks, forced: attended whatever their score, which is +inf
  window: int = 0  # likewise the last full blocks

  def __post_init__(self):
    if self.reduce not in REDUCTIONS:
      raise ValueError(f"reduce={self.reduce!r} is none of {', '.join(REDUCTIONS)}")

  def forced(self, block: Int32[Array, "*#b"], n_blocks: Int32[Array, "*#b"]) -> Bool[Array, "*any"]:
    """Whether blocks of a row of `n_blocks` are sinks or in the window."""
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
  return _reduced(rule(q.astype(jnp.float32), gathered), n_blocks, q.shape[-1], ranking)


def _reduced(by_head, n_blocks, depth, ranking):
  """[B, K, N] from [B, K, G, N]."""
  block, last = jnp.arange(by_head.shape[-1])[None], n_blocks[:, None]
  exists, forced = block < last, ranking.forced(block, last)
  scores = across_heads(by_head, (exists & ~forced)[:, None], depth, ranking.reduce)
  return jnp.where(exists[:, None], jnp.where(forced[:, None], jnp.inf, scores), -jnp.inf)


def _score_kernel(q, digest, layer, tables, n_blocks, ranking, implementation):
  """One program scores one tile of a row's blocks against all query heads of one KV head.

  Shares of a head need its scores of all tiles: with "softmax" the kernel writes them, and XLA does the rest.
  """
  n_rows, n_heads, n_group, depth = q.shape
  width = digest.shape[3] * depth  # a digest's E vectors, contiguous
  n = tables.shape[1]
  tile = min(pl.next_power_of_2(n), max(1, TILE_BYTES // (width * digest.dtype.itemsize)))
  n_written = n_group if ranking.reduce == "softmax" else 1  # H

  def kernel(layer_ref, tables_ref, n_blocks_ref, q_ref, digest_ref, scores_ref):
    k, b = pl.program_id(1), pl.program_id(2)
    start, last = pl.program_id(0) * tile, n_blocks_ref[b]
    i = jnp.minimum(start + jnp.arange(tile), n - 1)  # the last tile writes the last score several times
    exists, forced = i < last, ranking.forced(i, last)
    channel = jnp.arange(width)
    heads = (q_ref[b, k, g, channel & (depth - 1)].astype(jnp.float32) for g in range(n_group))
    weights = [ranking.rule.weight(head, channel // depth)[None] for head in heads]  # G times [1, E * D]

    def products():  # H times [tile]
      block = jnp.where(exists & ~forced, tables_ref[b, i], 0)  # any block that can be read: its score is not used
      vectors = digest_ref[k, layer_ref[0], block].astype(jnp.float32)  # [tile, E * D]
      if ranking.reduce == "mean":
        return (jnp.sum(vectors * (sum(weights) / n_group), 1),)
      scores = [jnp.sum(vectors * w, 1) for w in weights]
      return tuple(scores) if ranking.reduce == "softmax" else (functools.reduce(jnp.maximum, scores),)

    # Otherwise no block of the tile needs its digest.
    ranked = (start < last - ranking.window) & (start + tile > ranking.sinks)
    scores = jax.lax.cond(ranked, products, lambda: (jnp.zeros(tile, jnp.float32),) * n_written)
    for g, of_head in enumerate(scores):
      scores_ref[b, k, g, i] = jnp.where(exists, jnp.where(forced, jnp.inf, of_head), -jnp.inf)

  by_head = triton.call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((n_rows, n_heads, n_written, n), jnp.float32),
    grid=(pl.cdiv(n, tile), n_heads, n_rows),
    implementation=implementation,
    num_warps=NUM_WARPS,
    name="score",
  )(jnp.reshape(layer, 1), tables, n_blocks, q, digest.reshape(*digest.shape[:3], width))
  return _reduced(by_head, n_blocks, depth, ranking) if ranking.reduce == "softmax" else by_head[:, :, 0]
