"""Sizes that a configuration leaves open: what `auto` of `cache.dram_bytes` and `cache.hbm_bytes` comes to, and 0 of
`cache.lanes` and `scheduler.max_batch`.

On a GPU, HBM is what weights and activations leave, and DRAM most of what the host can pin. Where the devices are the
host, both are a modest part of its memory. The pool is never more than what all lanes can fill. Programs are compiled
for sizes, and what is free is never twice the same: so a host's memory is taken in coarse steps, and the next process
finds its programs compiled.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import os
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from sparse_serve_jax.attention.methods import get_method
from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import AUTO, EngineConfig, ModelConfig, override, with_requests
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.models import Model, is_placed
from sparse_serve_jax.serving import budget
from sparse_serve_jax.serving.budget import Needs, gib

DEVICE_SHARE = 0.95  # of what weights and activations leave of a device; the rest is for what is not counted
PINNED_SHARE = 0.75  # of the host's free memory; the system and its caches need some
CPU_SHARE, CPU_MOST = 1 / 8, 1 / 4  # of what weights and activations leave of a host that is the device
CPU_LEAST = 2 << 30  # bytes: at least so much, if that is not more than CPU_MOST
CPU_HBM = 1 / 4  # of that share, if blocks are offloaded
MAPS_SHARE = 1 / 4  # of HBM, at most, for digests and maps of the blocks in DRAM
FIXED_SHARE = 1 / 2  # of HBM, at most, for all that is no slot: a longer context is not taken by default
LEAST_CONTEXT = 1024  # tokens: no shorter one is tried
_ANY = 1 << 60  # bytes, more than there are
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Free:
  """Bytes that can be taken now."""

  device: int | None  # of each device; None: the devices are the host
  host: int
  placed: bool = False  # whether the weights are there already, and take nothing more


def free_here(placed: bool = False, sharing: int = 1) -> Free:
  """Of this machine; `placed`: the weights are there already; `sharing` processes share the host.

  Raises:
    ValueError: the system does not say how much memory it has.
  """
  gc.collect()  # an engine before this one may still lie there
  device, host = budget.device_bytes_free(), budget.host_bytes_free()
  if host is None:  # not Linux
    if "SC_PHYS_PAGES" not in os.sysconf_names:
      raise ValueError("the system does not say how much memory is free: give cache.hbm_bytes and cache.dram_bytes")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
  return Free(device, host // sharing, placed)


def resolve_here(config: EngineConfig, model: Model, mesh: Mesh, cudnn: bool, sharing: int = 1) -> EngineConfig:
  """`resolve` on this machine, whose memory `sharing` processes share. A line of the log says what has been derived.

  Raises:
    ValueError: as `resolve` and `budget.check_pool` do.
  """
  config = with_requests(config, gpu=jax.default_backend() == "gpu")
  budget.check_pool(config, budget.host_bytes_free)
  if not is_open(config):
    return config
  if jax.process_count() > 1:
    raise ValueError(
      f"cache.hbm_bytes={config.cache.hbm_bytes} and cache.dram_bytes={config.cache.dram_bytes}: {jax.process_count()} "
      "processes must have the same sizes, give numbers"
    )
  free = free_here(is_placed(model, mesh), sharing)
  made = resolve(config, model.config, free, cudnn)
  _LOG.warning("%s", text(config, made, CacheShape.of(model.config, made, _vectors(config)), free))
  return made


def is_open(config: EngineConfig) -> bool:
  """Whether bytes that the cache needs are left open."""
  return config.cache.hbm_bytes == AUTO or (config.cache.offload and config.cache.dram_bytes == AUTO)


def resolve(config: EngineConfig, model: ModelConfig, free: Free, cudnn: bool = False) -> EngineConfig:
  """The configuration with numbers for what it leaves open.

  If it leaves the longest context open too, that is halved until tails, slabs, digests and maps leave half of HBM to
  slots, or to the pool where that lies in HBM.

  Args:
    config: whose `cache.save` is chosen.
    model: shape of the model.
    free: what there is.
    cudnn: prefill attention makes no scores (`budget.Needs`).

  Raises:
    ValueError: not even the shortest context fits; with all numbers.
  """
  config = with_requests(config, gpu=free.device is not None)
  if not is_open(config):
    return config
  found, error = None, None
  for context in _contexts(config, model):
    changes = {"scheduler.max_context": context} if context else {}
    try:
      sized, shape = _sized(override(config, changes), model, free, cudnn)
    except ValueError as refused:
      error = refused
      continue
    found = sized
    if shape.fixed_bytes <= FIXED_SHARE * shape.hbm_bytes:
      return sized
  if found is None:
    raise error or AssertionError
  return found


def text(before: EngineConfig, config: EngineConfig, shape: CacheShape, free: Free) -> str:
  """What has been derived of a configuration, in a line with numbers."""
  told = {"cache.hbm_bytes": (before.cache.hbm_bytes, shape.hbm_bytes)}
  if config.cache.offload:
    told |= {"cache.dram_bytes": (before.cache.dram_bytes, shape.pool_bytes)}
  sizes = ", ".join(f"{key}=auto is {gib(n)}" for key, (given, n) in told.items() if given == AUTO)
  of = "" if free.device is None else f"{config.tp} x {gib(free.device)} of devices and "
  tokens = f"{shape.M * shape.S:,} tokens of KV, requests of up to {shape.max_context:,}"
  at_once = f"{config.cache.lanes} at a time, of which {config.scheduler.max_batch} decode"
  return f"{sizes} (free: {of}{gib(free.host)} of the host): {tokens}; {at_once}"


def used(config: EngineConfig, shape: CacheShape) -> dict[str, int]:
  """Sizes that an engine has, by their keys: bytes over all devices, tokens of the longest request, requests."""
  dram = {"cache.dram_bytes": shape.pool_bytes} if config.cache.offload else {}
  requests = {"cache.lanes": shape.R, "scheduler.max_batch": config.scheduler.max_batch}
  return {"cache.hbm_bytes": shape.hbm_bytes, **dram, "scheduler.max_context": shape.max_context, **requests}


def _vectors(config: EngineConfig) -> int:
  """E of the selection method."""
  return get_method(config.sparse.method).vectors


def _contexts(config: EngineConfig, model: ModelConfig) -> Iterator[int]:
  """Tokens of the longest request, as they are tried; 0 is what configuration and model say."""
  yield 0
  tokens = 0 if config.scheduler.max_context else model.max_context // 2
  while tokens >= LEAST_CONTEXT:
    yield tokens
    tokens //= 2


def _sized(config: EngineConfig, model: ModelConfig, free: Free, cudnn: bool) -> tuple[EngineConfig, CacheShape]:
  """With numbers, for requests of one length at most."""
  cache, n, vectors = config.cache, config.tp, _vectors(config)
  whole = override(config, {"cache.hbm_bytes": _ANY, "cache.dram_bytes": _ANY})
  most = CacheShape.of(model, whole, vectors)
  needs = Needs.of(model, config, most, Buckets.of(config, model.n_layers, most.max_context), cudnn)
  taken = needs.activations + (0 if free.placed else needs.weights)
  room = free.host - n * taken if free.device is None else free.device - taken
  if room <= 0:
    where, there = ("the host has", free.host) if free.device is None else ("each has", free.device)
    help = "lower scheduler.max_context, scheduler.max_batch or the prefill's pieces"
    if not free.placed and there <= (n if free.device is None else 1) * needs.weights:
      help = "the weights alone do not fit"
    raise ValueError(
      f"cache.hbm_bytes={cache.hbm_bytes} and cache.dram_bytes={cache.dram_bytes} leave sizes open, and nothing is "
      f"left for KV: {gib(needs.weights)} weights + {gib(needs.activations)} activations ({needs.text}) on each of {n} "
      f"devices, and {where} {gib(there)} free; {help}"
    )
  if free.device is None:
    share = _steady(max(CPU_SHARE * room, min(CPU_LEAST, CPU_MOST * room)), 2)
    hbm, dram = (CPU_HBM * share, (1 - CPU_HBM) * share) if cache.offload else (share, 0)
  else:
    hbm, dram = n * DEVICE_SHARE * room, _steady(PINNED_SHARE * free.host - most.saving_bytes, 8)
  filled = dataclasses.replace(most, M=most.R * most.N, P=0)  # all lanes are full
  hbm = min(hbm, _ANY if cache.offload else filled.hbm_bytes) if cache.hbm_bytes == AUTO else cache.size("hbm_bytes")
  sizes = {"cache.hbm_bytes": int(hbm)}
  if cache.offload and cache.dram_bytes == AUTO:
    block = most.pool_bytes // most.M
    blocks = min(dram // block, filled.M, MAPS_SHARE * hbm // max(1, most.per_pool_block_bytes))
    sizes["cache.dram_bytes"] = max(int(blocks), 1) * block
  shape = CacheShape.of(model, override(config, sizes), vectors)
  if cache.hbm_bytes == AUTO:
    sizes["cache.hbm_bytes"] = shape.hbm_bytes  # slots for more than there is in DRAM would never fill
  return override(config, sizes), shape


def _steady(n_bytes: float, steps: int) -> float:
  """Rounded down to one of so many sizes an octave."""
  if n_bytes < 1:
    return n_bytes
  step = 2.0 ** math.floor(math.log2(n_bytes)) / steps
  return n_bytes // step * step
