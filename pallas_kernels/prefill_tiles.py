"""Block-sparse attention of a piece of a prompt: each tile of its queries reads listed blocks before it, and itself."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import triton
from pallas_kernels.copy import gather_blocks
from pallas_kernels.prefill import Prefix
from pallas_kernels.stop import LOG2_E
from pallas_kernels.tiles import TileLists, Tiles

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How a program, of one tile of queries and one query head, goes through its list.

  Raises:
    ValueError: `turn_tokens` is no power of two.
  """

  turn_tokens: int = 64  # keys that are multiplied before the output is rescaled; whole blocks
  num_warps: int = 4
  num_stages: int = 2

  def __post_init__(self):
    if self.turn_tokens < 1 or self.turn_tokens & (self.turn_tokens - 1):
      raise ValueError(f"turn_tokens={self.turn_tokens} is no power of two, as tiles are, which turns must divide")

  def turn_blocks(self, block_tokens: int) -> int:
    """Blocks of `block_tokens` that are multiplied at a time."""
    return max(1, self.turn_tokens // block_tokens)


def prefill_tiles(
  q: Float[Array, "C K G D"],
  k: Float[Array, "C K D"],
  v: Float[Array, "C K D"],
  lists: TileLists,
  tiles: Tiles,
  prefix: Prefix | None = None,
  *,
  implementation: str = "xla",
  tiling: Tiling | None = None,
) -> Float[Array, "C K G D"]:
  """Attention of each query to the blocks that its tile's list has, and to its own tile up to itself.

  Products are scaled by D ** -0.5. Of the prefix only blocks in some list are read, from slots or pool.

  Args:
    q: of the piece's tokens.
    k: the piece's own keys.
    v: their values.
    lists: places, see `pallas_kernels.tiles`; N is that of `prefix`, 0 without one.
    tiles: how the piece is cut.
    prefix: what comes before the piece.
    implementation: "xla", "triton" or "interpret".
    tiling: of the kernel; None: what suits most shapes.

  Raises:
    ValueError: the lists are not of so many tiles, or the tiles not of so many tokens.
    NotImplementedError: a kernel was asked for, and S or D is not a power of two.
  """
  size = tiles.block_tokens
  triton.check(implementation, S=size, D=q.shape[-1])
  if (q.shape[0], lists.length.shape[0]) != (tiles.n_tokens, tiles.count):
    raise ValueError(
      f"{q.shape[0]} queries and lists of {lists.length.shape[0]} tiles, but {tiles} are {tiles.n_tokens} queries in "
      f"{tiles.count} tiles"
    )
  width, n_tokens = 0, tiles.n_tokens
  q, k, v = (tiles.padded(x) for x in (q, k, v))
  if prefix is not None:
    width = prefix.blocks.shape[1]
    earlier = gather_blocks(*_read(prefix, lists), implementation=implementation)
    k, v = (jnp.concatenate(x) for x in zip(earlier, (k, v), strict=True))
  if implementation == "xla":
    return _xla(q, k, v, lists, tiles, width)[:n_tokens]
  tiling = tiling or Tiling()
  o = triton.call(
    functools.partial(_kernel, tiles, width, tiling.turn_blocks(size)),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    grid=(q.shape[1] * q.shape[2], tiles.count),
    implementation=implementation,
    num_warps=tiling.num_warps,
    num_stages=tiling.num_stages,
    name="prefill_tiles",
  )(lists.places, lists.length, q, k, v)
  return o[:n_tokens]


def _read(prefix: Prefix, lists: TileLists) -> tuple[Any, ...]:
  """Arguments of `gather_blocks` by which blocks that no tile reads are not copied."""
  blocks = jnp.where(lists.any_reads(prefix.blocks.shape[1]), prefix.blocks, -2)
  return prefix.pool, prefix.slots, prefix.layer, blocks, prefix.slot


def _kernel(
  tiles: Tiles,
  width: int,
  turn: int,
  places_ref,  # [t, K, n]
  length_ref,  # [t, K]
  q_ref,  # [t * tile, K, G, D]
  k_ref,  # [width * S + t * tile, K, D]
  v_ref,  # as k_ref
  o_ref,  # as q_ref
):
  """One tile of queries and one query head. Heads of a tile follow each other, so that they find its blocks in L2."""
  n_group, depth, size = q_ref.shape[2], q_ref.shape[3], tiles.block_tokens
  head, g = jax.lax.div(pl.program_id(0), n_group), jax.lax.rem(pl.program_id(0), n_group)
  t = tiles.count - 1 - pl.program_id(1)  # the longest lists first
  rows = pl.ds(t * tiles.tile, tiles.tile)
  queries, row = q_ref[rows, head, g], jnp.arange(tiles.tile)

  def update(acc, starts, columns=None):
    """Blocks that begin at these keys; if they are the tile's own, at these of its columns."""
    o, m, l = acc
    products = []
    for i, start in enumerate(starts):
      s = triton.dot(queries, k_ref[pl.ds(start, size), head], trans_b=True) * (depth**-0.5 * LOG2_E)
      if columns is not None:
        s = jnp.where(row[:, None] >= (columns[i] + jnp.arange(size))[None], s, -jnp.inf)
      products.append(s)
    top = functools.reduce(jnp.maximum, [m, *(s.max(1) for s in products)])
    old = jnp.exp2(m - top)
    o, l = o * old[:, None], l * old
    for start, s in zip(starts, products, strict=True):
      p, values = jnp.exp2(s - top[:, None]), v_ref[pl.ds(start, size), head]
      o, l = o + triton.dot(p.astype(values.dtype), values), l + p.sum(1)
    return o, top, l

  def listed(n):
    """A turn of n blocks of the list, from entry i on."""
    return lambda i, acc: update(acc, [places_ref[t, head, i + j] * size for j in range(n)])

  def own(n):
    """A turn of n blocks of the tile itself."""

    def body(i, acc):
      columns = [(i * n + j) * size for j in range(n)]
      return update(acc, [width * size + t * tiles.tile + column for column in columns], columns)

    return body

  acc = jnp.zeros((tiles.tile, depth)), jnp.full((tiles.tile,), -jnp.inf), jnp.zeros((tiles.tile,))
  length = length_ref[t, head]
  turns = jax.lax.div(length, turn)
  acc = jax.lax.fori_loop(0, turns, lambda i, acc: listed(turn)(i * turn, acc), acc)
  if turn > 1:
    acc = jax.lax.fori_loop(turns * turn, length, listed(1), acc)
  of_own = min(turn, tiles.blocks)
  o, m, l = jax.lax.fori_loop(0, tiles.blocks // of_own, own(of_own), acc)
  # `m` is finite. Triton's compiler fails on a loop of which a result is not used (3.6: RemoveLayoutConversions).
  o_ref[rows, head, g] = jnp.where(m[:, None] > -jnp.inf, o / l[:, None], 0.0).astype(o_ref.dtype)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, lists: TileLists, tiles: Tiles, width: int) -> jax.Array:
  """The same, in whole tiles: q [t * tile, K, G, D], k and v [width * S + t * tile, K, D]."""
  (n_heads, n_group, depth), size = q.shape[1:], tiles.block_tokens
  k, v = (jnp.moveaxis(x, 1, 0).astype(jnp.float32) for x in (k, v))  # [K, T, D]
  row, token = jnp.arange(tiles.tile)[:, None], jnp.arange(k.shape[1])[None] - width * size

  def one(inputs):
    queries, places, length, t = inputs
    read = TileLists(places[None], length[None]).any_reads(k.shape[1] // size)
    read = jnp.repeat(read, size, 1)[:, None]  # [K, 1, T]
    own = ((token >= t * tiles.tile) & (token - t * tiles.tile <= row))[None]  # [1, tile, T]
    by_head = jnp.moveaxis(queries, 0, 2).astype(jnp.float32)  # [K, G, tile, D]
    s = jnp.einsum("kgqd,ktd->kgqt", by_head, k, precision=_HIGHEST) * depth**-0.5
    p = jax.nn.softmax(jnp.where((read | own)[:, None], s, -jnp.inf), -1)
    seen = jnp.where((read | own).any(1)[..., None], v, 0.0)  # 0 * NaN is NaN
    return jnp.moveaxis(jnp.einsum("kgqt,ktd->kgqd", p, seen, precision=_HIGHEST), 2, 0)

  by_tile = q.reshape(tiles.count, tiles.tile, n_heads, n_group, depth)
  out = jax.lax.map(one, (by_tile, lists.places, lists.length, jnp.arange(tiles.count)))
  return out.reshape(q.shape).astype(q.dtype)
