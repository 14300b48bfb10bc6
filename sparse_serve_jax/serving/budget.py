"""Whether an engine fits: what its weights, cache and largest programs take, beside what devices and host have.

Checked before anything is placed, so that what cannot fit is refused at once, with all numbers, and not by a device in
the middle of a run.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import pathlib
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from pallas_kernels.prefill import QUERY_TILE
from pallas_kernels.tiles import TILE
from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import AUTO, EngineConfig, ModelConfig
from sparse_serve_jax.memory import pinned
from sparse_serve_jax.memory.layout import ITEM_BYTES
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.models import Model, is_placed, llama
from sparse_serve_jax.step import MLP_TILE

_LOGIT_ARRAYS = 8  # float32 [B, V] that a step which draws tokens holds at once: sorts of all logits


@dataclasses.dataclass(frozen=True)
class Needs:
  """Bytes that an engine takes."""

  weights: int  # of a device
  kv: int  # of a device: slots, digests, maps, tails, prefill slab; and the pool when it lies there
  activations: int  # of a device, most that a program holds besides
  pool: int  # of the host, for all devices, with what is on its way there; 0 if the pool lies on the devices
  text: str  # what activations are of

  @classmethod
  def of(cls, cfg: ModelConfig, config: EngineConfig, shape: CacheShape, buckets: Buckets, cudnn: bool) -> Needs:
    """Of a model and a cache; `cudnn`: prefill attention makes no scores."""
    piece, n_devices = max((*buckets.first_pieces, *buckets.later_pieces)), config.tp
    rows = max((*buckets.batches, buckets.packed_rows))
    kept = max(piece, math.prod(buckets.hidden))
    activations = (kept + piece) * cfg.d_model * ITEM_BYTES[cfg.dtype]  # between segments, and within one
    activations += _layer_bytes(cfg, piece, shape.max_context, n_devices, cudnn)
    if config.sparse.prefill != "dense":
      activations += _tile_bytes(cfg, piece, shape, n_devices)
    return cls(
      weights=weight_bytes(cfg, n_devices),
      kv=shape.hbm_bytes // n_devices,
      activations=activations + _LOGIT_ARRAYS * 4 * rows * cfg.vocab_size,
      pool=shape.pool_bytes + shape.saving_bytes if shape.offload else 0,
      text=f"pieces of {piece} prompt tokens, {rows} rows of logits",
    )


def kv_bytes(cfg: ModelConfig) -> int:
  """Bytes of one token's keys and values, of all layers."""
  return 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * llama.dtype_of(cfg).itemsize


def weight_bytes(cfg: ModelConfig, n_devices: int) -> int:
  """Of one device."""
  shapes, specs = llama.param_shapes(cfg), llama.param_specs(cfg, n_devices)
  values = jax.tree.map(
    lambda shape, spec: math.prod(shape) // (n_devices if any(spec) else 1),
    shapes,
    specs,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  return sum(jax.tree.leaves(values)) * ITEM_BYTES[cfg.dtype]


def _layer_bytes(cfg: ModelConfig, piece: int, context: int, n_devices: int, cudnn: bool) -> int:
  """What a layer of a piece of a prompt holds at once besides (models/llama.py)."""
  item, n_heads, n_kv = ITEM_BYTES[cfg.dtype], cfg.n_heads // n_devices, cfg.n_kv_heads // n_devices
  attention = piece * cfg.head_dim * ((n_heads + 2 * n_kv) * item + n_heads * (4 + item))  # q, k, v; o twice
  if not cudnn:  # keys and values in float32, and the scores of a tile of queries
    attention += 4 * context * (2 * n_kv * cfg.head_dim + n_heads * QUERY_TILE)
  mlp = min(piece, MLP_TILE) * (cfg.d_ff // n_devices) * (2 * item + 4 + item)  # gate and up, SiLU, their product
  return attention + mlp


def _tile_bytes(cfg: ModelConfig, piece: int, shape: CacheShape, n_devices: int) -> int:
  """What sparse prefill of a layer holds besides: queries, and all keys and values in one, are copied; and five numbers
  for each block before a tile (`pallas_kernels.tiles`)."""
  item, n_kv = ITEM_BYTES[cfg.dtype], cfg.n_kv_heads // n_devices
  copies = (2 * piece * (cfg.n_heads // n_devices) + 2 * n_kv * (piece + shape.max_context)) * cfg.head_dim * item
  return copies + 5 * 4 * n_kv * (-(-piece // TILE)) * (shape.N + piece // shape.S)


def check(needs: Needs, model: Model, mesh: Mesh) -> None:
  """Compares needs with what there is now. Weights that are on the devices already take nothing more.

  Raises:
    ValueError: they do not fit; the message has all numbers.
  """
  device = jax.devices()[0]
  parts = {"weights": needs.weights, "KV (cache.hbm_bytes)": needs.kv, f"activations ({needs.text})": needs.activations}
  on_device = sum(parts.values()) - (needs.weights if is_placed(model, mesh) else 0)
  pool = {"the pool (cache.dram_bytes)": needs.pool}
  if device_bytes_free() is not None:
    _refuse(on_device, device_bytes_free, f"a device ({device.device_kind})", parts, "cache.hbm_bytes")
    _refuse(needs.pool, host_bytes_free, "the host", pool, "cache.dram_bytes")
  else:  # the devices are the host
    parts = {name: mesh.size * n for name, n in parts.items()} | pool
    on_host = mesh.size * on_device + needs.pool
    _refuse(on_host, host_bytes_free, "the host", parts, "cache.dram_bytes, cache.hbm_bytes")


def check_pool(config: EngineConfig, free: Callable[[], int | None]) -> None:
  """Compares the pool that is asked for with what is free of the host, before anything else is derived of its size.

  Raises:
    ValueError: `cache.dram_bytes` is a number, and more than the host has; with both.
  """
  if not config.cache.offload or config.cache.dram_bytes == AUTO:
    return
  asked = config.cache.size("dram_bytes") // jax.process_count()
  there = _short_of(asked, free)
  if there is not None:
    raise ValueError(
      f"cache.dram_bytes asks for {gib(asked)} of the host, which has {gib(there)} free: set it to less, or to auto"
    )


def _short_of(needed: int, free: Callable[[], int | None]) -> int | None:
  """What there is if that is less than needed; else None, also where nobody says what there is."""
  there = free()
  if there is not None and needed > there:
    gc.collect()  # an engine before this one may still lie there
    there = free()
  return None if there is None or needed <= there else there


def _refuse(needed: int, free: Callable[[], int | None], where: str, parts: dict[str, int], lower: str) -> None:
  there = _short_of(needed, free)
  if there is None:
    return
  sums = " + ".join(f"{gib(n)} {name}" for name, n in parts.items())
  raise ValueError(
    f"this does not fit {where}: {sums} = {gib(sum(parts.values()))}, and {gib(there)} are free of what JAX may use; "
    f"lower {lower}, scheduler.max_context, scheduler.max_batch or the prefill's pieces"
  )


def bytes_free() -> int | None:
  """What a program can take now: of a device, or of the host where the devices are the host; None: not known."""
  on_device = device_bytes_free()
  return host_bytes_free() if on_device is None else on_device


def device_bytes_free() -> int | None:
  """Of what JAX may use of a device; None where that is not limited apart from the host's memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def host_bytes_free() -> int | None:
  """What the system, and the limit of a container, say can be taken without swapping; None where nothing says it."""
  pinned.give_back()
  file = pathlib.Path("/proc/meminfo")
  said = (
    [line.split()[1] for line in file.read_text().splitlines() if "MemAvailable:" in line] if file.is_file() else []
  )
  free = [1024 * int(kib) for kib in said] + group_bytes_free(pathlib.Path("/sys/fs/cgroup"))
  return min(free, default=None)


def group_bytes_free(folder: pathlib.Path) -> list[int]:
  """What a control group's limit leaves of memory, file caches that can go not counted; [] if it has no limit."""
  try:
    most, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
  except (OSError, ValueError):
    return []
  return [] if most == "max" else [max(0, int(most) - int(used) + int(stat.get("inactive_file", 0)))]


def gib(n: int) -> str:
  """For a reader."""
  return f"{n / 2**30:.2f} GiB"
