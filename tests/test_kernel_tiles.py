"""Block-sparse prefill attention and its lists against loops in float64. What no tile may read is NaN."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels.tiles import BY
from tests.cases import DTYPES, IMPLEMENTATIONS, REAL, TOLERANCE, Shape, assert_rows_close

SMALL = Shape(3, 8, 16)


class Piece(NamedTuple):
  """A piece of C tokens in tiles of `tile`, after `n_before` blocks of a list with room for N; None: it begins one.

  Each tile and head reads `share` of the blocks before it, drawn at random, of which some are then a list of none.
  """

  n_before: int | None
  C: int = 56
  tile: int = 16
  share: float = 0.5
  shape: Shape = SMALL
  K: int = 2
  N: int = 5


class Drawn(NamedTuple):
  arguments: tuple  # q, k, v, lists
  prefix: kernels.Prefix | None
  tiles: kernels.Tiles
  expected: np.ndarray  # [C, K, G, D] float64
  poisoned: np.ndarray  # [C, K] bool: queries that see NaN, since their tile's own blocks are


def draw(piece: Piece, dtype: str, seed: int = 3, poison: bool = False) -> Drawn:
  """With `poison` every third own block is NaN, and no list has it."""
  rng = np.random.default_rng(seed)
  n_before, C, tile, share, (G, S, D), K, N = piece
  make = lambda *dims: rng.normal(size=dims).astype(DTYPES[dtype])  # noqa: E731
  tiles, width = kernels.Tiles(C, S, tile), 0 if n_before is None else N
  before = make(n_before or 0, K, 2, S, D)
  q, k, v = 2 * make(C, K, G, D), make(C, K, D), make(C, K, D)
  bad = np.zeros(C // S, bool)
  bad[1::3] = poison
  places = np.full((tiles.count, K, max(1, width + C // S)), -1 if width else 10**6, np.int32)
  length = np.zeros((tiles.count, K), np.int32)
  for t, head in np.ndindex(tiles.count, K):
    own = [width + i for i in range(t * tiles.blocks) if not bad[i]]
    chosen = rng.permutation([*range(n_before or 0), *own])
    length[t, head] = 0 if (t + head) % 4 == 3 else math.ceil(share * len(chosen))
    places[t, head, : length[t, head]] = chosen[: length[t, head]]
  lists = kernels.TileLists(places, length)

  expected = np.zeros((C, K, G, D))
  for i, head, g in np.ndindex(C, K, G):
    t = i // tile
    blocks = [before[p, head] for p in places[t, head, : length[t, head]] if p < width]
    starts = [(p - width) * S for p in places[t, head, : length[t, head]] if p >= width]
    keys = [b[0] for b in blocks] + [k[s : s + S, head] for s in starts] + [k[t * tile : i + 1, head]]
    values = [b[1] for b in blocks] + [v[s : s + S, head] for s in starts] + [v[t * tile : i + 1, head]]
    keys, values = (np.concatenate(x).astype(float) for x in (keys, values))
    p = np.exp(keys @ q[i, head, g].astype(float) * D**-0.5)
    expected[i, head, g] = p @ values / p.sum()

  hidden = np.repeat(bad, S)
  k[hidden], v[hidden] = np.nan, np.nan
  poisoned = np.zeros((C, K), bool)
  for i in np.flatnonzero(bad):
    poisoned[i * S // tile * tile : (i * S // tile + 1) * tile] = True
  prefix = None if n_before is None else lay_out(before, lists, N, rng)
  return Drawn((q, k, v, lists), prefix, tiles, expected, poisoned)


def lay_out(before: np.ndarray, lists: kernels.TileLists, N: int, rng: np.random.Generator) -> kernels.Prefix:
  """Blocks [n, K, 2, S, D] that a list has, in slots and pool at random places; all else is NaN."""
  n, K, _, S, D = before.shape
  M, P, layer = 2 * N + 3, K * N + 1, 1
  pool, slots = np.full((K, 2, M, 2, S, D), np.nan, before.dtype), np.full((P, 2, S, D), np.nan, before.dtype)
  blocks, slot = np.full((K, N), -1, np.int32), np.full((K, N), -1, np.int32)
  free = rng.permutation(P).tolist()
  for head in range(K):
    blocks[head, :n] = rng.permutation(M)[:n]
    for i in range(n):
      read = any(i in lists.places[t, head, : lists.length[t, head]] for t in range(len(lists.length)))
      if (head + i) % 2:
        slot[head, i] = free.pop()
        slots[slot[head, i]] = before[i, head] if read else np.nan
      elif read:
        pool[head, layer, blocks[head, i]] = before[i, head]
  return kernels.Prefix(pool, slots, np.int32(layer), blocks, slot, np.int32(n * S))


@functools.cache
def program(tiles: kernels.Tiles, implementation: str, **options):
  return jax.jit(functools.partial(kernels.prefill_tiles, tiles=tiles, implementation=implementation, **options))


def attend(drawn: Drawn, implementation: str, **options) -> np.ndarray:
  o = program(drawn.tiles, implementation, **options)(*drawn.arguments, prefix=drawn.prefix)
  return np.asarray(o.astype(jnp.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_before", [None, 0, 3, 5])
def test_prefill_tiles(n_before: int | None, dtype: str, implementation: str):
  """Tiles of two blocks, of which the last has one; turns of two blocks and of one."""
  drawn = draw(Piece(n_before), dtype)
  actual = attend(drawn, implementation, tiling=kernels.Tiling(turn_tokens=16))
  assert_rows_close(actual, drawn.expected, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("C", "tile"), [(8, 8), (24, 8), (24, 64)])
def test_tiles_of_other_sizes(C: int, tile: int, implementation: str):
  """Of one block, in one turn; and longer than the piece."""
  drawn = draw(Piece(4, C, tile, shape=Shape(2, 8, 16)), "float32")
  assert_rows_close(attend(drawn, implementation), drawn.expected, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n_before", [None, 3])
def test_own_blocks_that_are_in_no_list_are_not_read(n_before: int | None, implementation: str):
  drawn = draw(Piece(n_before, C=96), "float32", poison=True)
  seen = ~drawn.poisoned
  assert seen.any() and not seen.all()
  assert_rows_close(attend(drawn, implementation)[seen], drawn.expected[seen], TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_blocks_are_dense_attention(implementation: str):
  """The op for dense pieces over the same prefix, of which nothing is NaN now."""
  drawn = draw(Piece(5, C=40, share=1.0), "float32")
  q, k, v, _ = drawn.arguments
  assert drawn.prefix is not None
  count, n_before = drawn.tiles.count, 5
  places = np.broadcast_to(np.arange(n_before + 5, dtype=np.int32), (count, 2, n_before + 5))
  length = np.broadcast_to((n_before + 2 * np.arange(count, dtype=np.int32))[:, None], (count, 2))
  finite = drawn.prefix._replace(pool=np.nan_to_num(drawn.prefix.pool), slots=np.nan_to_num(drawn.prefix.slots))
  whole = drawn._replace(arguments=(q, k, v, kernels.TileLists(places, length)), prefix=finite)
  dense = jax.jit(functools.partial(kernels.prefill_attention, implementation="xla"))(q, k, v, finite)
  assert_rows_close(attend(whole, implementation), dense, TOLERANCE["float32"])


OF_REAL = [(name, n) for name in REAL for n in (None, 7)] + [("llama3-8b", n) for n in (0, 1, 8)]  # by one program


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "n_before"), OF_REAL)
def test_prefill_tiles_of_real_shapes(name: str, n_before: int | None):
  drawn = draw(Piece(n_before, 416, 128, shape=REAL[name], N=8), "bfloat16")
  assert_rows_close(attend(drawn, "triton"), drawn.expected, TOLERANCE["bfloat16"])
  q, k, v, lists = drawn.arguments
  with pytest.raises(AssertionError):
    assert_rows_close(attend(drawn._replace(arguments=(q, v, k, lists)), "triton"), drawn.expected, 1e-2)


def test_wrong_tiles_are_refused():
  drawn = draw(Piece(None), "float32")
  with pytest.raises(ValueError, match="56 queries and lists of 4 tiles.*7 tiles"):
    attend(drawn._replace(tiles=kernels.Tiles(56, 8, 8)), "xla")
  for tile, n_tokens, block_tokens in ((12, 24, 4), (16, 64, 32), (16, 20, 8)):
    with pytest.raises(ValueError, match=f"tile={tile} .*{block_tokens} tokens.*{n_tokens} tokens"):
      kernels.Tiles(n_tokens, block_tokens, tile)


# ------------------------------------------------------------------------------------------------------------ the lists


def test_mean_queries_leave_padding_out():
  q = np.random.default_rng(0).normal(size=(40, 2, 3, 16)).astype(np.float32)
  q[27:] = np.nan
  mean = np.asarray(kernels.Tiles(40, 8, 16).mean(jnp.asarray(q), 27))
  assert mean.shape == (3, 2, 3, 16)
  np.testing.assert_allclose(mean[0], q[:16].mean(0), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(mean[1], q[16:27].mean(0), rtol=1e-5, atol=1e-6)
  assert (mean[2] == 0).all()


@functools.cache
def lists_program(tiles: kernels.Tiles, width: int, rule: kernels.TileRule, implementation: str):
  def make(scores, n_before, n_own):
    known = kernels.Places(n_before, n_own, width)
    return kernels.tile_lists(scores, tiles, known, rule, implementation=implementation)

  return jax.jit(make)


def listed(scores, tiles, places, rule, implementation="xla") -> list[list[list[int]]]:
  """By tile and head."""

  run = lists_program(tiles, places.width, rule, implementation)
  lists = run(jnp.asarray(scores, jnp.float32), np.int32(places.n_before), np.int32(places.n_own))
  return [
    [row[:n].tolist() for row, n in zip(of, lengths, strict=True)]
    for of, lengths in zip(np.asarray(lists.places), np.asarray(lists.length), strict=True)
  ]


class Listing(NamedTuple):
  """Tiles of two blocks after 3 of a prefix with room for 4; tokens of the piece begin 9 of its 10 blocks."""

  tiles: kernels.Tiles = kernels.Tiles(80, 8, 16)
  n_before: int = 3
  n_own: int = 9
  width: int = 4

  @property
  def places(self) -> kernels.Places:
    return kernels.Places(self.n_before, self.n_own, self.width)

  def before(self, t: int) -> list[int]:
    """Places of the blocks before a tile, in order."""
    return [*range(self.n_before), *(self.width + i for i in range(2 * t))] if 2 * t < self.n_own else []

  def scores(self, seed: int) -> np.ndarray:
    """NaN where there is no block."""
    drawn = np.random.default_rng(seed).normal(size=(5, 2, self.width + 10))
    for t in range(5):
      drawn[t][:, [p for p in range(self.width + 10) if p not in self.before(t)]] = np.nan
    return drawn


# The last reads all blocks as sinks and window, whatever the share.
LISTINGS = [(*forced, share) for forced in ((0, 0), (1, 2)) for share in (0.1, 0.5, 1.0)] + [(2, 30, 0.1)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("sinks", "window", "share"), LISTINGS)
def test_tile_lists(sinks: int, window: int, share: float, by: str, implementation: str):
  of, rule = Listing(), kernels.TileRule(by, share, sinks, window)
  scores, shares = of.scores(1), set()
  found = listed(scores, of.tiles, of.places, rule, implementation)
  for t, head in np.ndindex(5, 2):
    before = of.before(t)
    forced = [p for i, p in enumerate(before) if i < sinks or i >= len(before) - window]
    others = sorted((p for p in before if p not in forced), key=lambda p: -scores[t, head, p])
    masses = {p: math.exp(scores[t, head, p]) for p in before}
    if by == "top_k":
      expected = [*forced, *others][: max(len(forced), math.ceil(share * len(before) - 1e-6))]
    else:
      expected = list(forced)
      while others and (share == 1 or sum(masses[p] for p in expected) < share * sum(masses.values())):
        expected.append(others.pop(0))
    assert found[t][head] == expected, (t, head)
    shares.add(len(expected) / max(1, len(before)))
  if by == "threshold" and share == 0.5 and not window:
    assert len(shares) > 3  # heads and tiles differ


def test_a_tile_of_padding_reads_nothing():
  rule = kernels.TileRule("top_k", 1.0, 1, 1)
  for n_own, expected in ((3, [3, 5, 0, 0, 0]), (4, [3, 5, 0, 0, 0]), (5, [3, 5, 7, 0, 0])):
    of = Listing(n_own=n_own)
    assert [len(by_head[0]) for by_head in listed(of.scores(2), of.tiles, of.places, rule)] == expected


def test_shares_are_rounded_up_and_floats_are_forgiven():
  assert kernels.TileRule("top_k", 0.1, 0, 0).counts(30)[[0, 1, 10, 11, 20, 30]].tolist() == [0, 1, 1, 2, 2, 3]
  assert kernels.TileRule("top_k", 1.0, 0, 0).counts(30).tolist() == list(range(31))


def test_wrong_rules_are_refused():
  with pytest.raises(ValueError, match="turn_tokens=48 is no power of two"):
    kernels.Tiling(turn_tokens=48)
  with pytest.raises(ValueError, match="by='mass' is none of top_k, threshold"):
    kernels.TileRule("mass", 0.5, 1, 1)
  for share in (0.0, 1.5):
    with pytest.raises(ValueError, match=f"share={share}"):
      kernels.TileRule("top_k", share, 1, 1)
  with pytest.raises(ValueError, match="-1 sinks"):
    kernels.TileRule("top_k", 0.5, -1, 1)
