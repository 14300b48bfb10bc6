"""The ops of a decode step over a two-tier KV cache. jax and numpy only; each op says its own shapes.

`score` and `select` choose blocks, `residency` says where they are, `attend` reads them there, `copy` moves them.
"""

from pallas_kernels import copy, digest, residency, score
from pallas_kernels.attend import attend
from pallas_kernels.copy import gather_blocks, load_blocks, place_blocks, store_blocks
from pallas_kernels.partial import Partial, merge
from pallas_kernels.prefill import prefill_attention
from pallas_kernels.residency import Maps, Proposal

__all__ = [
  "Maps",
  "Partial",
  "Proposal",
  "attend",
  "copy",
  "digest",
  "gather_blocks",
  "load_blocks",
  "merge",
  "place_blocks",
  "prefill_attention",
  "residency",
  "score",
  "store_blocks",
]
