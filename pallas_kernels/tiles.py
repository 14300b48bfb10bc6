"""Which blocks before it a tile of a prompt's queries reads: a list for each tile and KV head.

Blocks are known by their *place*: those of the prefix, of a list with room for N, have places 0 to N - 1, and the
piece's own have N and beyond. What a tile's own tokens are in, its diagonal, is read anyway and in no list.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.select import fits, select

TILE = 128  # queries: as many rows as a tensor core's product wants
BY = ("top_k", "threshold")


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How a piece of a prompt is cut.

  Raises:
    ValueError: a tile is no power of two or less than a block, or a piece is not whole blocks.
  """

  n_tokens: int  # C
  block_tokens: int  # S
  tile: int  # queries; the last tile may have fewer

  def __post_init__(self):
    if self.tile & (self.tile - 1) or self.tile < self.block_tokens or self.n_tokens % self.block_tokens:
      raise ValueError(
        f"tile={self.tile} queries is no power of two, or less than a block of {self.block_tokens} tokens, or a piece "
        f"of {self.n_tokens} tokens is not whole blocks"
      )

  @classmethod
  def of(cls, n_tokens: int, block_tokens: int) -> Tiles:
    """Tiles of TILE queries; of fewer for a piece whose `n_tokens` are fewer. `block_tokens` is S."""
    return cls(n_tokens, block_tokens, min(TILE, pl.next_power_of_2(n_tokens)))

  @property
  def count(self) -> int:
    """Tiles of the piece."""
    return -(-self.n_tokens // self.tile)

  @property
  def blocks(self) -> int:
    """Of a tile."""
    return self.tile // self.block_tokens

  @property
  def padding(self) -> int:
    """Tokens that the last tile lacks."""
    return self.count * self.tile - self.n_tokens

  def padded(self, x: jax.Array) -> jax.Array:
    """Of tokens `x` [C, ...], zeros after them: whole tiles."""
    return jnp.pad(x, [(0, self.padding), *[(0, 0)] * (x.ndim - 1)]) if self.padding else x

  def mean(self, q: Float[Array, "C K G D"], n_tokens: Int32[Array, ""] | int) -> Float32[Array, "t K G D"]:
    """The mean of the queries `q` of each tile, over the first `n_tokens` of the piece; 0 of a tile that has none."""
    real = (jnp.arange(self.n_tokens) < n_tokens).reshape(-1, *[1] * (q.ndim - 1))
    q = self.padded(jnp.where(real, q.astype(jnp.float32), 0.0)).reshape(self.count, self.tile, *q.shape[1:])
    n = jnp.clip(n_tokens - self.tile * jnp.arange(self.count), 1, self.tile)
    return q.sum(1) / n.reshape(-1, *[1] * (q.ndim - 2)).astype(jnp.float32)


class TileLists(NamedTuple):
  """What each of t tiles reads."""

  places: Int32[Array, "t K n"]  # distinct; anything beyond the length
  length: Int32[Array, "t K"]

  def any_reads(self, n: int) -> Bool[Array, "K n"]:
    """Which of the first `n` places some tile reads."""
    head = jnp.arange(self.length.shape[1])[None, :, None]
    listed = jnp.arange(self.places.shape[2])[None, None] < self.length[..., None]
    places = jnp.where(listed, self.places, n)
    return jnp.zeros((self.length.shape[1], n), bool).at[head, places].set(True, mode="drop")


@dataclasses.dataclass(frozen=True)
class TileRule:
  """How many of the blocks before it a tile reads.

  "top_k": a share of them. "threshold": the best, until their estimated attention mass is that share of the mass of
  all; a head that looks at little reads little. Sinks and window are read first and count. A share of 1 reads all.

  Raises:
    ValueError: a `by` that is not in BY, a share that is not in (0, 1], or a negative number of blocks.
  """

  by: str  # a name in BY
  share: float  # in (0, 1]
  sinks: int  # the first blocks of the prompt
  window: int  # the last blocks before the tile

  def __post_init__(self):
    if self.by not in BY:
      raise ValueError(f"by={self.by!r} is none of {', '.join(BY)}")
    if not 0 < self.share <= 1 or self.sinks < 0 or self.window < 0:
      raise ValueError(f"share={self.share} is not in (0, 1], or {self.sinks} sinks or {self.window} blocks of window")

  def most(self, n: int) -> int:
    """Of `n` blocks, the most that are read."""
    return n if self.by == "threshold" else min(n, max(int(self.counts(n)[-1]), self.sinks + self.window))

  def counts(self, n: int) -> np.ndarray:
    """int32 [`n` + 1]: the share of 0, 1, ..., n blocks, rounded up, but for what a product of floats is off by."""
    return np.ceil(self.share * np.arange(n + 1) - 1e-6).astype(np.int32)


class Places(NamedTuple):
  """What the places of a piece's blocks are."""

  n_before: Int32[Array, ""] | int  # blocks of the prefix; they have the first places of `width`
  n_own: Int32[Array, ""] | int  # blocks of the piece that its tokens begin
  width: int  # N, room for the prefix

  def seen(self, tiles: Tiles, rule: TileRule) -> tuple[Bool[Array, "t n"], Bool[Array, "t n"]]:
    """Whether a place has a block before each tile, and whether that is a sink or in the window.

    A tile that begins after all tokens is padding, and has none before it.
    """
    place = jnp.arange(self.width + tiles.n_tokens // tiles.block_tokens)[None]
    first = tiles.blocks * jnp.arange(tiles.count)[:, None]  # own blocks before the tile
    is_own, own = place >= self.width, place - self.width
    exists = jnp.where(is_own, own < first, place < self.n_before) & (first < self.n_own)
    position = jnp.where(is_own, self.n_before + own, place)
    forced = (position < rule.sinks) | (position >= self.n_before + first - rule.window)
    return exists, exists & forced


def tile_lists(
  scores: Float32[Array, "t K n"], tiles: Tiles, places: Places, rule: TileRule, *, implementation: str = "xla"
) -> TileLists:
  """What each tile reads, in the order of its scores, sinks and window first.

  Args:
    scores: of all places for each tile; to estimate masses, logs of the mean mass of a block's tokens. Where there is
      no block they may be anything.
    tiles: how the piece is cut.
    places: which blocks there are.
    rule: how many are read.
    implementation: "xla", "triton" or "interpret": of `select`.
  """
  n = scores.shape[-1]
  exists, forced = (x[:, None] for x in places.seen(tiles, rule))
  ranks = jnp.where(exists, jnp.where(forced, jnp.inf, scores), -jnp.inf)
  most = max(1, rule.most(n))
  ranked, listed = select(ranks, most, implementation=implementation if fits(n, most) else "xla")
  n_exist = jnp.broadcast_to(exists.sum(-1, dtype=jnp.int32), scores.shape[:2])
  if rule.share == 1:
    length = n_exist
  elif rule.by == "top_k":
    wanted = jnp.asarray(rule.counts(n))[n_exist]
    length = jnp.maximum(wanted, jnp.broadcast_to(forced.sum(-1, dtype=jnp.int32), wanted.shape))
  else:
    masses = jax.nn.softmax(jnp.where(exists, scores, -jnp.inf), -1, where=jnp.broadcast_to(exists, scores.shape))
    masses = jnp.take_along_axis(masses, listed, -1)
    needed = jnp.isposinf(ranked) | (jnp.cumsum(masses, -1) - masses < rule.share)
    length = jnp.minimum((needed & (ranked > -jnp.inf)).sum(-1, dtype=jnp.int32), n_exist)
  return TileLists(listed, length)
