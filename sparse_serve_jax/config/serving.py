"""Everything that a run of the engine depends on besides the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sparse_serve_jax.config.model import ModelConfig
from sparse_serve_jax.config.reader import check_fields, find_config, read_config

AUTO = "auto"  # a size that is derived from the devices (serving.sizes)
MOVING = "auto:"  # begins a threshold that moves
LEAST_PROMISE = 1e-4
MOST_PROMISE = 0.9999  # of one that moves: shares are of float32, and one rounded to 1 is never passed
AUDIT, MOST_AUDIT = 0.01, 0.1  # sparse.audit where a threshold that moves needs one; the most there can be
DRAWN = ("held:", "replay:")  # begin methods of benchmarks (`attention.drawn`)
BLOCK_SIZES = (8, 16, 32, 64, 128)  # S: powers of two, for kernels


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """Where KV lives. Sizes are bytes over all devices; JSON may write "8GiB". "auto": what the devices have room for.

  Raises:
    ValueError: a value of the wrong type or size.
  """

  SECTION = "cache"

  block_tokens: int = 32
  """Tokens of a block, S: 8, 16, 32, 64 or 128."""
  offload: bool = True
  """Whether the pool of all blocks lies in DRAM, with slots for hot ones in HBM. False: it lies in HBM, and there are
  no slots (vLLM, vLLM-S)."""
  dram_bytes: int | str = AUTO
  """Bytes of DRAM for the pool, if it lies there, over all devices. "auto": most of what the host can pin; on a CPU a
  modest part of its memory."""
  hbm_bytes: int | str = AUTO
  """Bytes of HBM over all devices for slots, digests, maps, tails and the prefill slab; and for the pool, if it lies
  there. "auto": what weights and activations leave."""
  lanes: int = 64
  """Places of resident requests, R: prefilling, decoding or paused. 0: 64 on a GPU, 16 on a CPU, or `max_batch` if that
  is more."""
  load: str = "fused"
  """How blocks move from DRAM to the devices: a name in memory.loads.LOADS."""
  save: str = "auto"
  """How finished blocks move to DRAM: a name in memory.saves.SAVES. "auto": staged if DRAM is memory of another kind
  and JAX has one process, else direct."""
  eviction: str = "lru"
  """Which slot a block that was read from DRAM may take: a name in memory.eviction.EVICTIONS."""
  zones: Literal["shared", "layer", "lane"] = "shared"
  """Among which slots: all (SparseServe), an equal share for each layer, as pools of each layer are (PSA), or for each
  lane, a hot buffer of each request (HiSparse), of 1 / lanes of all slots however few requests there are."""
  prefix: bool = True
  """Whether blocks stay in the pool when their request has ended, as long as there is room, and prompts that begin like
  it share them."""

  def __post_init__(self):
    check_fields(self, positive=("block_tokens",), not_negative=("lanes",))
    for name in ("dram_bytes", "hbm_bytes"):
      if getattr(self, name) != AUTO and self.size(name) <= 0:
        raise ValueError(f"cache.{name}={getattr(self, name)} must be positive")
    if self.block_tokens not in BLOCK_SIZES:
      raise ValueError(f"cache.block_tokens={self.block_tokens} is not one of {BLOCK_SIZES}")

  def size(self, name: Literal["dram_bytes", "hbm_bytes"]) -> int:
    """The size `name`, in bytes, of a configuration that has a number for it.

    Raises:
      ValueError: it is "auto", which stands for no number before an engine is made.
    """
    value = self.dram_bytes if name == "dram_bytes" else self.hbm_bytes
    if isinstance(value, str):
      raise ValueError(f"cache.{name}={value!r} is derived where an engine is made; here it must be a number of bytes")
    return value


@dataclasses.dataclass(frozen=True)
class SparseConfig:
  """What a decode step attends to, and the queries of a prompt.

  Raises:
    ValueError: a value of the wrong type or size, or a `threshold` or an `audit` that `policy` does not read.
  """

  SECTION = "sparse"

  policy: Literal["dense", "topk", "psa"] = "topk"
  """How many blocks a decode step attends to: all (dense), as many as a budget of tokens allows (topk), or those that
  hold a share of the attention mass (psa)."""
  method: str = "cuboid_mean"
  """How blocks are ranked: a name in attention.methods.METHODS; in benchmarks also held:A, replay:FILE[,FILE],
  one trace of selections of a budget and one of PSA."""
  token_budget: int = 2048
  """topk: tokens attended to in a step, sinks and window included. Every policy: how much of the end of a prompt, or of
  each piece that a layer of it is cut into, enters slots; of a chunked prompt everything does, and of others with
  `cache.prefix` as much more as nobody needs slots for."""
  sink_tokens: int = 64
  """The first tokens, always attended to, as in ArkVale (two blocks of 32)."""
  window_tokens: int = 64
  """Tokens of the newest full blocks, always attended to."""
  dense_layers: int = 0
  """The first layers, so many, that attend to everything (2 in ArkVale and Quest)."""
  group_reduce: Literal["mean", "max", "softmax"] = "mean"
  """What a block's scores of the query heads of a KV head become: their mean, the largest, or the mean of the shares
  that they estimate (softmax), in which a head whose query is large counts no more than another; a prompt's tiles take
  the mean of the scores then."""
  threshold: float | str = 0.95
  """psa: epsilon, stop when the estimated share of attention mass exceeds it. "auto:0.95" moves it while serving, until
  the true share is 0.95 in 95 % of the stops that are audited."""
  audit: float = 0.0
  """psa: how many blocks may be read to find the true share of some stops, as a part of those attended to: 0.01 is 1 %.
  0: none, but 0.01 for a threshold that moves."""
  group_blocks: int = 16
  """psa: blocks between two stop tests, and before the first (docs/psa.md says why so many)."""
  rest: str = "last_two_groups"
  """psa: what the test takes an unread block's attention mass for, a name in pallas_kernels.stop.REST: the least of a
  ranked block so far (PSA), or the mean of the last ranked groups, which does not trust the ranking to leave the
  lightest for the end."""
  stop_when: Literal["every_head", "mean_of_heads"] = "every_head"
  """psa: whose estimate must exceed the threshold: that of every query head of a KV head, or their mean."""
  stop: Literal["kernel", "host_loop"] = "kernel"
  """psa: where the test is made: in the attention kernel, or outside of it (host_loop), which then runs once a group;
  the host waits for every test (PSA, section 2.3, with which the test in the kernel is compared)."""
  prefill: Literal["dense", "top_k", "threshold"] = "dense"
  """Of the blocks before it a tile of 128 queries of a prompt reads all (dense); or the best by `method`, sinks and
  window among them: "top_k" a share of the blocks, "threshold" so many that they hold a share of the attention mass, as
  the scores estimate it. The first `dense_layers` read all."""
  prefill_share: float = 0.5
  """Of blocks, or of mass, for `prefill`; 1 is all. A dense one takes no notice, so that both may be compared."""

  def __post_init__(self):
    check_fields(self, ("token_budget", "group_blocks"), ("sink_tokens", "window_tokens", "dense_layers"))
    self._check_promise()
    if not 0 < self.prefill_share <= 1:
      raise ValueError(f"sparse.prefill_share={self.prefill_share} is not in (0, 1]")
    if self.group_blocks & (self.group_blocks - 1):
      raise ValueError(f"sparse.group_blocks={self.group_blocks} is not a power of two")

  @property
  def drawn(self) -> bool:
    """Whether selections are drawn, and not the model's own."""
    return self.method.startswith(DRAWN)

  def refuse_drawn(self, where: str) -> None:
    """Raises ValueError if selections are drawn: `where` answers are meant."""
    if self.drawn:
      raise ValueError(
        f"sparse.method={self.method!r} draws selections, for benchmarks of random weights: not for {where}"
      )

  @property
  def moves(self) -> bool:
    """Whether the threshold is one that moves."""
    return isinstance(self.threshold, str)

  @property
  def promise(self) -> float:
    """The share of the attention mass that a progressive list is to reach: P of "auto:P", or the threshold."""
    return float(self.threshold.removeprefix(MOVING)) if isinstance(self.threshold, str) else self.threshold

  @property
  def fixed_threshold(self) -> float:
    """The threshold, of a configuration that keeps it. Raises ValueError if it moves."""
    if isinstance(self.threshold, str):
      raise ValueError(f"sparse.threshold={self.threshold!r} moves while an engine serves; here it must be a number")
    return self.threshold

  @property
  def audit_share(self) -> float:
    """`audit`, or what a threshold that moves has by default."""
    return self.audit or (AUDIT if self.moves else 0.0)

  @property
  def prefills_in_part(self) -> bool:
    """Whether a prompt's tiles of queries may leave out blocks before them."""
    return self.prefill != "dense" and self.prefill_share != 1

  def _check_promise(self) -> None:
    if isinstance(self.threshold, str):
      try:
        promise = self.promise if self.threshold.startswith(MOVING) else math.nan
      except ValueError:
        promise = math.nan
      if not LEAST_PROMISE <= promise <= MOST_PROMISE:
        limits = f"[{LEAST_PROMISE:g}, {MOST_PROMISE}]"
        told = f"sparse.threshold={self.threshold!r}"
        raise ValueError(f"{told} is neither a number in (0, 1] nor auto:P with P in {limits}")
    elif not 0 < self.threshold <= 1:
      raise ValueError(f"sparse.threshold={self.threshold} is not in (0, 1]")
    if not 0 <= self.audit <= MOST_AUDIT:
      raise ValueError(f"sparse.audit={self.audit} is not in [0, {MOST_AUDIT}]")
    for name, given in (("threshold", self.moves), ("audit", self.audit > 0)):
      if given and self.policy != "psa":
        raise ValueError(
          f"sparse.{name}={getattr(self, name)!r} is of progressive lists, it needs sparse.policy='psa', not "
          f"{self.policy!r}"
        )


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
  """Who runs in an iteration."""

  SECTION = "scheduler"

  max_batch: int = 64
  """The most decode rows of an iteration: R_max of Algorithm 1, SparseServe. 0: 64 on a GPU, 8 on a CPU, or `lanes` if
  that is less."""
  max_tokens: int = 0
  """The most tokens of an iteration, a decode row being one: T_max of Algorithm 1, SparseServe; 0: no limit."""
  max_context: int = 0
  """The most tokens of one request, prompt and output; 0: what model and pool allow."""
  prefill: Literal["layer_segmented", "chunked"] = "layer_segmented"
  """How prompts are cut: some layers of all their tokens at a time, or some tokens through all layers."""
  chunk_tokens: int = 2048
  """chunked: prompt tokens of an iteration, through all layers."""
  max_inject_tokens: int = 0
  """layer_segmented: token x layers of an iteration; 0: 2048 x layers (SparseServe, section 4)."""
  reserve: Literal["full", "on_demand"] = "full"
  """Which pool blocks a request gets when it is admitted. full: for its prompt and all its output. on_demand: for its
  prompt, and for output as that is written; if the pool has none the youngest requests are preempted, and compute again
  what is lost of their KV (vLLM)."""
  batch_control: Literal["working_set", "none"] = "working_set"
  """Which decode rows run: those whose working sets fit the slots together, or all."""
  working_set_steps: int = 12
  """Steps whose blocks are a row's working set: w of Algorithm 1, SparseServe."""

  def __post_init__(self):
    check_fields(
      self,
      positive=("chunk_tokens", "working_set_steps"),
      not_negative=("max_batch", "max_tokens", "max_context", "max_inject_tokens"),
    )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Everything a run depends on besides the model.

  Every field is checked where it is made, so that a wrong value is met at once and with its numbers, not ten layers
  down.

  Raises:
    ValueError: a value of the wrong type or size, or fields that exclude each other.
  """

  KIND = "serving"

  cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
  sparse: SparseConfig = dataclasses.field(default_factory=SparseConfig)
  scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
  implementation: Literal["auto", "xla", "triton", "interpret"] = "auto"
  """Of the kernels. "auto": triton on a GPU, else xla."""
  tp: int = 1
  """Devices that the model is split over."""

  def __post_init__(self):
    check_fields(self, positive=("tp",))
    size, sparse, chunk = self.cache.block_tokens, self.sparse, self.scheduler.chunk_tokens
    least = max(1, self.sink_blocks + self.window_blocks)
    if sparse.policy == "topk" and self.budget_blocks < least:
      raise ValueError(
        f"sparse.token_budget={sparse.token_budget} is {self.budget_blocks} blocks of {size} tokens, but sinks "
        f"({sparse.sink_tokens} tokens: {self.sink_blocks} blocks) and window ({sparse.window_tokens} tokens: "
        f"{self.window_blocks} blocks) need {least}: sparse.token_budget must be at least {least * size}"
      )
    if sparse.policy == "psa" and sparse.stop == "kernel" and self.cache.load != "fused":
      raise ValueError(
        f"a rung whose parts exclude each other: cache.load={self.cache.load!r} copies all blocks of a list before "
        f"attention, and sparse.policy='psa' stops inside it; use cache.load='fused' or sparse.stop='host_loop'"
      )
    if self.cache.save == "staged" and not self.cache.offload:
      raise ValueError("cache.save='staged' writes a pool in host memory: it needs cache.offload=true")
    if 0 < self.scheduler.max_tokens < size:
      raise ValueError(
        f"scheduler.max_tokens={self.scheduler.max_tokens} is below one block of {size} tokens, the least that is "
        f"prefilled at once: it must be at least {size}, or 0 for no limit"
      )
    if self.scheduler.prefill == "chunked" and chunk % (8 * size if chunk > 8 * size else size):
      wanted = f"whole blocks of {size}, or beyond 8 not a multiple of 8 blocks"
      raise ValueError(f"scheduler.chunk_tokens={chunk} is not {wanted}")

  def check_model(self, model: ModelConfig) -> None:
    """Raises ValueError for what would be cut down to the model without a word."""
    for key, value, limit in (
      ("sparse.dense_layers", self.sparse.dense_layers, model.n_layers),
      ("scheduler.max_context", self.scheduler.max_context, model.max_context),
    ):
      if value > limit:
        raise ValueError(f"{key}={value} is beyond the model's {limit}")

  def prefill_allowance(self, n_layers: int) -> int:
    """What one iteration may prefill: token x layers when layer-segmented, tokens (through all layers) when chunked;
    `n_layers` are the model's.

    It is also the most tokens that are prefilled at once. Under `max_tokens` a chunk is at most that long; it shrinks
    when decode rows run. The pieces of a layer-segmented prompt are the same in every layer, so they cannot shrink:
    they fit beside a full batch of decode rows, if that leaves a block.
    """
    of, limit = self.scheduler, self.scheduler.max_tokens
    if of.prefill == "chunked":
      return min(of.chunk_tokens, limit or of.chunk_tokens)
    inject = of.max_inject_tokens or 2048 * n_layers  # B x L, SparseServe, section 4
    return min(inject, max(limit - of.max_batch, self.cache.block_tokens) * n_layers) if limit else inject

  @property
  def selects(self) -> bool:
    """Whether anything is attended to in part, for which blocks have digests."""
    return self.sparse.policy != "dense" or self.sparse.prefill != "dense"

  @property
  def budget_blocks(self) -> int:
    """Full blocks that a top-k step attends to, sinks and window included."""
    return self.sparse.token_budget // self.cache.block_tokens

  @property
  def sink_blocks(self) -> int:
    """Blocks that hold the sinks, rounded up."""
    return math.ceil(self.sparse.sink_tokens / self.cache.block_tokens)

  @property
  def window_blocks(self) -> int:
    """Full blocks that the window is, rounded up."""
    return math.ceil(self.sparse.window_tokens / self.cache.block_tokens)


def with_requests(config: EngineConfig, gpu: bool) -> EngineConfig:
  """The configuration with numbers of lanes and decode rows where it says 0. A GPU (`gpu`) has time for many rows
  while it reads the weights; a CPU has not."""
  cache, scheduler = config.cache, config.scheduler
  if cache.lanes and scheduler.max_batch:
    return config
  lanes, rows = (64, 64) if gpu else (16, 8)
  lanes = cache.lanes or max(lanes, scheduler.max_batch)
  rows = scheduler.max_batch or min(rows, lanes)
  return dataclasses.replace(
    config,
    cache=dataclasses.replace(cache, lanes=lanes),
    scheduler=dataclasses.replace(scheduler, max_batch=rows),
  )


def with_fixed_sizes(config: EngineConfig) -> EngineConfig:
  """The configuration with 256 MiB of HBM and 1 GiB of DRAM where it says "auto", and a CPU's lanes and decode rows
  where it says 0: for what must be the same on every machine, or has no devices."""
  config = with_requests(config, gpu=False)
  cache = config.cache
  hbm = 256 << 20 if cache.hbm_bytes == AUTO else cache.hbm_bytes
  dram = 1 << 30 if cache.dram_bytes == AUTO else cache.dram_bytes
  return dataclasses.replace(config, cache=dataclasses.replace(cache, hbm_bytes=hbm, dram_bytes=dram))


def load_config(source: str | Path | Mapping[str, Any] | EngineConfig) -> EngineConfig:
  """The engine configuration that is meant.

  The byte sizes in configs/serving are "auto", and lanes and decode rows 0: derived from the devices where an engine is
  made.

  Args:
    source: a name ("psa": configs/serving/psa.json), a JSON file's path, the values that such a file would hold
      ({"extends": "psa", "tp": 2}), or the configuration itself.

  Raises:
    ValueError: no such name or file, no JSON, an unknown key, or a wrong value; names the file, and the nearest key.
  """
  if isinstance(source, EngineConfig):
    return source
  return read_config(EngineConfig, source if isinstance(source, Mapping) else find_config("serving", source))
