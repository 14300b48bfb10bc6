"""Block-sparse prefill beside dense attention of the same tokens: the kernel's time for a block that it reads, by the
share of blocks and by how the kernel is cut; and the time of the lists.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from pallas_kernels.digest import cuboid_mean
from pallas_kernels.tiles import BY
from sparse_serve_jax.attention import METHODS
from sparse_serve_jax.attention.prefill import TileSelector
from sparse_serve_jax.benchmarks.bench import Bench, Cases
from sparse_serve_jax.benchmarks.timing import Row, Timing

SHARES = (0.125, 0.25, 1.0)  # of the blocks before a tile
TUNED = 0.25  # the share that other tilings are timed at
TILINGS = [  # queries of a tile, and the kernel's
  *((128, kernels.Tiling(*of)) for of in itertools.product((32, 64, 128), (4, 8), (2, 3, 4))),
  *((64, kernels.Tiling(*of)) for of in itertools.product((32, 64), (4,), (3, 4))),
]


def drawn_lists(b: Bench, tiles: kernels.Tiles, share: float) -> kernels.TileLists:
  """A share of the blocks before each tile, drawn at random, in the order that they are drawn in."""
  n = tiles.n_tokens // tiles.block_tokens
  length = np.ceil(share * tiles.blocks * np.arange(tiles.count)).astype(np.int32)
  order = b.rng.permuted(np.broadcast_to(np.arange(n, dtype=np.int32), (tiles.count, b.heads, n)), axis=-1)
  before = order < tiles.blocks * np.arange(tiles.count)[:, None, None]
  places = np.take_along_axis(order, np.argsort(~before, axis=-1, kind="stable"), -1)
  width = max(1, int(length.max()))
  length = np.broadcast_to(length[:, None], before.shape[:2])
  return kernels.TileLists(jnp.asarray(places[..., :width]), jnp.asarray(length))


def prefill_tiles(b: Bench) -> Cases:
  """A whole prompt. Blocks are counted for each tile and KV head, half of the tile's own among them, as is dense's."""

  def inputs(n: int):
    return b.random(n, b.heads, b.group, b.depth), *(b.random(n, b.heads, b.depth) for _ in range(2))

  @functools.cache
  def dense(n: int) -> Timing:
    attention = functools.partial(kernels.prefill_attention, **b.kernel)
    return b.time(lambda state, _, inputs: (state, attention(*inputs)), b.variants(lambda: inputs(n)))

  def case(n: int, share: float, tile: int, tiling: kernels.Tiling | None) -> Row:
    tiles = kernels.Tiles(n, b.size, tile)

    def op(state, _, inputs):
      q, k, v, lists = inputs
      return state, kernels.prefill_tiles(q, k, v, lists, tiles, None, tiling=tiling, **b.kernel)

    measured = b.time(op, b.variants(lambda: (*inputs(n), drawn_lists(b, tiles, share))))
    listed = b.heads * np.ceil(share * tiles.blocks * np.arange(tiles.count)).sum()
    own, every = b.heads * tiles.count * tiles.blocks / 2, b.heads * tiles.blocks * np.arange(tiles.count).sum()
    products = 4 * tile * b.group * b.size * b.depth  # of a block: two products
    moved = dict(hbm=4 * n * b.heads * (b.group + 1) * b.depth, flops=float((listed + own) * products))
    row = b.row(measured, moved, {"dense": lambda: dense(n)})
    us, of_dense = measured.us / (listed + own), row["baselines"]["dense"]
    row |= dict(blocks_read=float(listed + own), us_per_block=us)
    if not isinstance(of_dense, str):
      row |= dict(dense_us_per_block=of_dense / (every + own), times_dense_per_block=us * (every + own) / of_dense)
    return row

  n, tile = b.pick((32768, 128), (64, 16))
  for share in b.pick(SHARES, (0.25, 1.0)):
    yield f"{n} share {share:g}", functools.partial(case, n, share, tile, None)
  for queries, tiling in b.pick(TILINGS, [(16, kernels.Tiling(8, 4, 2))]):
    name = f"{n} share {TUNED:g} tile {queries} turn {tiling.turn_tokens} warps {tiling.num_warps}"
    yield f"{name} stages {tiling.num_stages}", functools.partial(case, n, TUNED, queries, tiling)


def tile_lists(b: Bench) -> Cases:
  """Mean queries, scores of digests and lists of a whole prompt, as the engine makes them; and by `top_k` of XLA."""

  def case(n: int, by: str) -> Row:
    tiles, blocks = kernels.Tiles.of(n, b.size), n // b.size
    selector = TileSelector(METHODS["cuboid_mean"], "mean", kernels.TileRule(by, 0.25, 2, 2))
    places = kernels.Places(0, jnp.int32(blocks), 0)

    def time(implementation: str) -> Timing:
      def op(state, _, inputs):
        q, digests = inputs
        return state, selector.lists(q, jnp.int32(n), digests, tiles, places, implementation)

      return b.time(op, variants)

    def inputs():
      return b.random(n, b.heads, b.group, b.depth), jax.jit(cuboid_mean)(b.random(b.heads, blocks, b.size, b.depth))

    variants = b.variants(inputs)
    hbm = 2 * b.heads * (n * b.group + 2 * blocks) * b.depth + 8 * tiles.count * b.heads * blocks
    return b.row(time(b.kernel["implementation"]), dict(hbm=hbm), {"xla": lambda: time("xla")})

  n = b.pick(32768, 64)
  for by in BY:
    yield f"{n} {by}", functools.partial(case, n, by)
