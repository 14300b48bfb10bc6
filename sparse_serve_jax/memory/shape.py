"""The sizes of a cache: what the byte budgets of a configuration come to. No jax, so that a scheduler or a simulator
knows them too.
"""

from __future__ import annotations

import bisect
import dataclasses

from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import CacheConfig, EngineConfig, ModelConfig
from sparse_serve_jax.memory.layout import BlockLayout

INT = 4  # bytes of an entry of maps and tables


@dataclasses.dataclass(frozen=True)
class CacheShape:
  """Sizes over all devices. The letters are the alphabet's."""

  K: int
  L: int
  M: int
  P: int
  R: int
  S: int
  D: int
  E: int
  dtype: str
  offload: bool
  max_context: int  # tokens, prompt and output, of the longest request that model, configuration and pool allow
  slab_tokens: int  # most tokens of one layer that prefill holds at once: a piece, and what came before it
  saving_tokens: int = 0  # most token x layers whose KV is on its way to the pool beside the programs, of two of them

  @property
  def N(self) -> int:
    """Blocks of a request's table."""
    return -(-self.max_context // self.S)

  @property
  def layout(self) -> BlockLayout:
    """Of a block's bytes."""
    return BlockLayout(self.S, self.D, self.dtype)

  @property
  def block_bytes(self) -> int:
    """K and V of one KV head and layer: 2 S D values."""
    return self.layout.bytes

  @property
  def pool_shape(self) -> tuple[int, ...]:
    """[K, L, M, *block]"""
    return self.K, self.L, self.M, *self.layout.shape

  @property
  def per_pool_block_bytes(self) -> int:
    """HBM that one block id of the pool takes in digests and in two maps, all layers and heads."""
    return self.K * self.L * (self.E * self.layout.vector_bytes + 2 * INT)

  @property
  def slot_bytes(self) -> int:
    """HBM of a slot and its entries in three maps."""
    return self.block_bytes + 3 * INT

  @property
  def pool_bytes(self) -> int:
    """Of the pool, wherever it lies."""
    return self.M * self.K * self.L * self.block_bytes

  @property
  def saving_bytes(self) -> int:
    """HBM of slabs that leave for the pool."""
    return self.K * -(-self.saving_tokens // self.S) * self.block_bytes

  @property
  def fixed_bytes(self) -> int:
    """HBM apart from slots and pool: tails, tables, prefill slabs (one layer's KV, and what leaves), digests, maps."""
    tails = self.K * self.L * self.R * self.block_bytes
    slab = self.K * -(-self.slab_tokens // self.S) * self.block_bytes
    return tails + self.R * self.N * INT + slab + self.saving_bytes + self.M * self.per_pool_block_bytes

  @property
  def hbm_bytes(self) -> int:
    """HBM of the whole cache, the pool included where it lies there."""
    return self.fixed_bytes + self.P * self.slot_bytes + (0 if self.offload else self.pool_bytes)

  @classmethod
  def of(cls, model: ModelConfig, config: EngineConfig, vectors: int) -> CacheShape:
    """Divides the byte budgets of `config.cache` for a model.

    `vectors` is E of the selection method, unused when all is dense.

    Raises:
      ValueError: a budget is "auto", or below what one slot of every zone and device, or one block of a request, needs;
        or lanes or decode rows are 0.
    """
    cache = config.cache
    if not (cache.lanes and config.scheduler.max_batch):
      raise ValueError(
        f"cache.lanes={cache.lanes} and scheduler.max_batch={config.scheduler.max_batch}: 0 is derived where an engine "
        "is made; here they must be numbers of requests"
      )
    limit = min(model.max_context, config.scheduler.max_context or model.max_context)
    piece = config.prefill_allowance(model.n_layers)
    empty = cls(
      K=model.n_kv_heads,
      L=model.n_layers,
      M=0,
      P=0,
      R=cache.lanes,
      S=cache.block_tokens,
      D=model.head_dim,
      E=vectors if config.selects else 0,
      dtype=model.dtype,
      offload=cache.offload,
      max_context=limit,
      slab_tokens=0,
    )

    def with_pool(blocks: int) -> CacheShape:
      context = min(limit, blocks * empty.S)
      slab = context if piece >= context else context + piece
      saving = 2 * Buckets.of(config, model.n_layers, context).most_at_once if cache.save == "staged" else 0
      return dataclasses.replace(empty, M=blocks, max_context=context, slab_tokens=slab, saving_tokens=saving)

    if cache.offload:
      zones = {"shared": 1, "layer": empty.L, "lane": empty.R}[cache.zones]
      return _with_slots(with_pool, cache, zones * config.tp)
    return _in_hbm(with_pool, cache.size("hbm_bytes"))


def _in_hbm(with_pool, hbm_bytes: int) -> CacheShape:
  """The pool is what HBM has left, and tables and slab depend on it."""

  def needed(blocks: int) -> int:
    return with_pool(blocks).hbm_bytes

  one = with_pool(1)
  if needed(1) > hbm_bytes:
    raise ValueError(
      f"cache.hbm_bytes={hbm_bytes} is below the minimum of {needed(1)} bytes without offload: {one.pool_bytes} for "
      f"one block of a request in all layers, the rest for {one.R} tails and the prefill slab; set "
      f"cache.hbm_bytes={needed(1)} or more, or lower cache.lanes"
    )
  return with_pool(bisect.bisect_right(range(hbm_bytes // one.pool_bytes + 1), hbm_bytes, key=needed) - 1)


def _with_slots(with_pool, cache: CacheConfig, n_zones: int) -> CacheShape:
  """The pool is what DRAM holds, slots are what HBM has left, in equal zones, those of all devices counted."""
  one, dram_bytes, hbm_bytes = with_pool(1), cache.size("dram_bytes"), cache.size("hbm_bytes")
  blocks = dram_bytes // one.pool_bytes
  if blocks < 1:
    raise ValueError(f"cache.dram_bytes={dram_bytes} is below the {one.pool_bytes} bytes of one request's block")
  shape = with_pool(blocks)
  least = shape.slot_bytes * n_zones
  slots = (hbm_bytes - shape.fixed_bytes) // least * n_zones
  if slots < n_zones:
    minimum = shape.fixed_bytes + least
    raise ValueError(
      f"cache.hbm_bytes={hbm_bytes} is below the minimum of {minimum} bytes: "
      f"{blocks * shape.per_pool_block_bytes} for digests and maps of {blocks} blocks, the rest for {shape.R} tails, "
      f"tables, the prefill slab and one slot per zone and device, {n_zones} in all; set cache.hbm_bytes={minimum} or "
      "more, or lower cache.dram_bytes, cache.lanes or scheduler.max_context"
    )
  ids = shape.R * min(shape.N, blocks) if cache.zones == "lane" else blocks  # any lane may have the longest request
  most = -(-ids * shape.K * shape.L // n_zones) * n_zones  # more would never fill
  return dataclasses.replace(shape, P=min(slots, most))
