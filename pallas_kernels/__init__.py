"""The ops of a step over a two-tier KV cache. jax and numpy only; each op says its own shapes.

`score` and `select` choose blocks, `propose` says where they are, `attend` reads them there, the copies move them.
Rules for digests and scores are in `pallas_kernels.digest` and `pallas_kernels.score`. Every op takes `implementation`:
"xla", jnp on any backend; "triton", the GPU's path; "interpret", its kernels run anywhere, slowly. Another name is a
ValueError, and what a kernel cannot take (S, D or E that is no power of two) a NotImplementedError, of every op.
"""

from pallas_kernels.ahead import arrived, compact, load_each, store_each
from pallas_kernels.attend import Tails, Taking, attend, attend_and_take
from pallas_kernels.commit import commit
from pallas_kernels.copy import gather_blocks, load_blocks, place_blocks, store_blocks
from pallas_kernels.digest import store_digests
from pallas_kernels.free import Free, evict, vacate
from pallas_kernels.maps import (
  NEVER,
  SPARE,
  Maps,
  Victims,
  ages,
  release,
  renew,
  rest,
  room,
  saturate,
  since_entry,
  tidy,
  touch,
  victims,
)
from pallas_kernels.packed import Packed
from pallas_kernels.partial import Partial, merge, merge_along
from pallas_kernels.prefill import Prefix, prefill_attention
from pallas_kernels.prefill_tiles import Tiling, prefill_tiles
from pallas_kernels.progress import Rounds, attend_by_block, attend_to_tail
from pallas_kernels.residency import Located, find, propose
from pallas_kernels.score import Ranking, score, tile_scores
from pallas_kernels.select import Listed, select
from pallas_kernels.stop import Stop, StopRule
from pallas_kernels.tiles import Places, TileLists, TileRule, Tiles, tile_lists

__all__ = [
  "NEVER",
  "SPARE",
  "Free",
  "Listed",
  "Located",
  "Maps",
  "Packed",
  "Partial",
  "Places",
  "Prefix",
  "Ranking",
  "Rounds",
  "Stop",
  "StopRule",
  "Tails",
  "Taking",
  "TileLists",
  "TileRule",
  "Tiles",
  "Tiling",
  "Victims",
  "ages",
  "arrived",
  "attend",
  "attend_and_take",
  "attend_by_block",
  "attend_to_tail",
  "commit",
  "compact",
  "evict",
  "find",
  "gather_blocks",
  "load_blocks",
  "load_each",
  "merge",
  "merge_along",
  "place_blocks",
  "prefill_attention",
  "prefill_tiles",
  "propose",
  "release",
  "renew",
  "rest",
  "room",
  "saturate",
  "score",
  "select",
  "since_entry",
  "store_blocks",
  "store_digests",
  "store_each",
  "tidy",
  "tile_lists",
  "tile_scores",
  "touch",
  "vacate",
  "victims",
]
