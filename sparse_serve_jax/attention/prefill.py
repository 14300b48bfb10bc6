"""Attention of one layer of a piece of a prompt."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import pallas_kernels as kernels
from sparse_serve_jax.attention.methods import Method, check_products, get_method
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory.kv_cache import KVCache

Number = int | jax.Array  # of layers


class Before(NamedTuple):
  """What comes before a piece of a prompt."""

  blocks: Int32[Array, " N"]  # in the pool; -1 beyond `n_blocks`
  n_blocks: Int32[Array, ""]

  @classmethod
  def of(cls, table: Int32[Array, " N"], n_blocks: Int32[Array, ""]) -> Before:
    """The first blocks of a table."""
    return cls(jnp.where(jnp.arange(table.shape[0]) < n_blocks, table, -1), n_blocks)

  def prefix(self, cache: KVCache, layer: Int32[Array, ""]) -> kernels.Prefix:
    """Where it lies."""
    slot = jnp.where((self.blocks >= 0)[None], cache.hot.maps.slot_of[:, layer, self.blocks], -1)  # [K, N]
    blocks, n_tokens = jnp.broadcast_to(self.blocks, slot.shape), self.n_blocks * cache.pool.shape[4]
    return kernels.Prefix(cache.pool, cache.hot.slots, layer, blocks, slot, n_tokens)


class Piece(NamedTuple):
  """A piece of a prompt, or several prompts in one, as every layer sees it."""

  before: Before | None  # None: it begins the prompt
  blocks: Int32[Array, " n"]  # its own, in the pool; -1 where one is not full
  n_tokens: Int32[Array, ""]  # those that are not padding, of a prompt alone
  packed: kernels.Packed | None = None  # the prompts, if they are several: each attends to all of itself


@dataclasses.dataclass(frozen=True)
class TileSelector:
  """Which blocks before it a tile of a prompt's queries attends to: the best by the score of its mean query."""

  method: Method
  reduce: str
  rule: kernels.TileRule

  @classmethod
  def of(cls, config: EngineConfig) -> TileSelector | None:
    """None: to all."""
    sparse = config.sparse
    if sparse.prefill == "dense":
      return None
    if sparse.prefill == "threshold":
      check_products(sparse.method, "sparse.prefill='threshold'")
    rule = kernels.TileRule(sparse.prefill, sparse.prefill_share, config.sink_blocks, config.window_blocks)
    return cls(get_method(sparse.method), sparse.group_reduce, rule)

  def lists(
    self,
    q: Float[Array, "C K G D"],
    n_tokens: Int32[Array, ""],
    digests: Float[Array, "K n E D"],
    tiles: kernels.Tiles,
    places: kernels.Places,
    implementation: str,
  ) -> kernels.TileLists:
    """The lists of all tiles; `n_tokens` of the queries are not padding, and every place has a digest or anything."""
    queries = jnp.moveaxis(tiles.mean(q, n_tokens), 0, 1)  # [K, t, G, D]
    # "softmax" is of decode steps: here it is the mean.
    scores = kernels.tile_scores(self.method.score, queries, digests.astype(jnp.float32), self.reduce)
    scores = jnp.moveaxis(scores, 0, 1) * q.shape[-1] ** -0.5
    return kernels.tile_lists(scores, tiles, places, self.rule, implementation=implementation)


@dataclasses.dataclass(frozen=True)
class PrefillAttention:
  """What is fixed of the attention of a piece when a program is compiled; dense without a `selector`."""

  selector: TileSelector | None
  implementation: str

  def parts(self, first: Number, n: Number, dense_layers: int) -> list[tuple[Number, Number, PrefillAttention]]:
    """How n layers from the first on attend: the first of a range, their number and how, which are none where one of
    the two is traced at least."""
    if self.selector is None or dense_layers == 0:
      return [(first, n, self)]
    known = isinstance(first, int) and isinstance(n, int)
    dense = jnp.clip(dense_layers - first, 0, n) if not known else min(max(dense_layers - first, 0), n)
    parts = [(first, dense, dataclasses.replace(self, selector=None)), (first + dense, n - dense, self)]
    return [part for part in parts if not known or part[1]]

  def __call__(
    self,
    q: Float[Array, "C K G D"],
    k: Float[Array, "C K D"],
    v: Float[Array, "C K D"],
    cache: KVCache,
    layer: Int32[Array, ""],
    piece: Piece,
  ) -> tuple[Float[Array, "C K G D"], Int32[Array, ""]]:
    """Attention over the piece's own keys and values and over what comes before it; digests of all are there.

    Returns:
      The output, and how many blocks of this device's heads were read from the pool because no slot has them.
    """
    before, read = piece.before, None
    prefix = None if before is None else before.prefix(cache, layer)
    if self.selector is None or piece.packed is not None:  # of a pack every query reads all before it anyway
      o = kernels.prefill_attention(q, k, v, prefix, packed=piece.packed, implementation=self.implementation)
    else:
      n_before, width = (0, 0) if before is None else (before.n_blocks, before.blocks.shape[0])
      table = piece.blocks if before is None else jnp.concatenate([before.blocks, piece.blocks])
      tiles = kernels.Tiles.of(q.shape[0], cache.pool.shape[4])
      places = kernels.Places(n_before, -(-piece.n_tokens // cache.pool.shape[4]), width)
      digests = cache.hot.digest[:, layer, jnp.maximum(table, 0)]
      lists = self.selector.lists(q, piece.n_tokens, digests, tiles, places, self.implementation)
      o = kernels.prefill_tiles(q, k, v, lists, tiles, prefix, implementation=self.implementation)
      read = lists.any_reads(width)
    if before is None or prefix is None or cache.hot.slots.shape[0] == 0:  # nothing before; or the pool lies in HBM
      return o, jnp.int32(0)
    missed = (before.blocks >= 0)[None] & (prefix.slot < 0)
    return o, (missed if read is None else missed & read).sum(dtype=jnp.int32)
