"""Runs plans on the devices: numpy in, jitted programs, numpy out one iteration late."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_serve_jax.attention.methods import get_method
from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory import kv_cache
from sparse_serve_jax.memory.kv_cache import CacheShape
from sparse_serve_jax.models import Model, llama, place_params
from sparse_serve_jax.serving.plan import (
  MAX_BANNED,
  Capacity,
  DecodeRow,
  Plan,
  PrefillWork,
  Sampling,
  StepResult,
  StepStats,
)
from sparse_serve_jax.step import DecodeBatch, PrefillBatch, SamplingRows, Setup, programs

RELEASE_WIDTH = 1024  # blocks of one call of the release program


@dataclasses.dataclass
class Pending:
  """A dispatched iteration. Its arrays are on their way; `result` waits for them."""

  decode: tuple[DecodeRow, ...] = ()
  decoded: tuple[jax.Array, jax.Array] | None = None  # tokens [B]; attended, missed, slots in use
  prefilled: list[tuple[PrefillWork, jax.Array]] = dataclasses.field(default_factory=list)  # token, loaded, in use
  measured: tuple[tuple[DecodeRow, ...], jax.Array] | None = None
  saved: int = 0

  def result(self) -> StepResult:
    tokens, attended, missed, loaded, in_use = {}, 0, 0, 0, 0
    for work, out in self.prefilled:
      token, read, in_use = (int(x) for x in np.asarray(out))
      loaded += read
      if work.last:
        tokens[work.request_id] = token
    if self.decoded is not None:
      tokens |= {row.request_id: int(t) for row, t in zip(self.decode, np.asarray(self.decoded[0]), strict=False)}
      attended, missed, in_use = (int(x) for x in np.asarray(self.decoded[1]))
    working_sets = {}
    if self.measured is not None:
      rows, counts = self.measured
      working_sets = {row.request_id: int(c) for row, c in zip(rows, np.asarray(counts), strict=False)}
    return StepResult(tokens, working_sets, StepStats(attended, missed, missed + loaded, self.saved, in_use))


class JaxExecutor:
  """Holds weights, cache and the activations of a prompt that is between two segments.

  Raises:
    ValueError: a byte budget is too small, or `tp` does not divide the model or exceeds the devices there are.
    NotImplementedError: the implementation does not run here, or cannot read where the pool lies.
  """

  def __init__(self, config: EngineConfig, model: Model):
    devices = jax.devices()
    if config.tp > len(devices):
      raise ValueError(f"tp={config.tp} needs as many devices, and there are {len(devices)}")
    cfg = model.config
    method = get_method(config.sparse.method)
    self.shape = CacheShape.of(cfg, config, method.vectors)
    self.mesh = jax.make_mesh((config.tp,), ("tp",), (jax.sharding.AxisType.Auto,), devices=devices[: config.tp])
    on_gpu = jax.default_backend() == "gpu"
    implementation = config.implementation
    if implementation == "auto":
      implementation = "triton" if on_gpu else "xla"
    if implementation == "triton" and not on_gpu:
      raise NotImplementedError(f"implementation='triton' needs an NVIDIA GPU, JAX runs on {jax.default_backend()}")
    if implementation != "xla" and cfg.head_dim & (cfg.head_dim - 1):
      raise NotImplementedError(f"head_dim={cfg.head_dim} is not a power of two: only implementation='xla' can, in HBM")
    setup = Setup.of(cfg, config, implementation)
    if setup.host_pool and implementation == "xla":
      raise NotImplementedError(
        "implementation='xla' cannot read a pool in host memory; use 'triton', or cache.offload=false"
      )
    self.programs = programs(setup, self.mesh)
    self.buckets = Buckets.of(config, cfg.n_layers, self.shape.max_context)
    self.params = place_params(model, self.mesh)
    self.cache = kv_cache.create(self.shape, self.mesh)
    self.capacity = Capacity(
      pool_blocks=self.shape.M,
      slots=self.shape.P,
      rows=self.shape.R,
      max_context=min(cfg.max_context, config.scheduler.max_context or cfg.max_context),
      n_layers=cfg.n_layers,
      n_kv_heads=cfg.n_kv_heads,
      block_bytes=self.shape.block_bytes,
      fixed_hbm_bytes=self.shape.fixed_bytes,
    )
    self._d_model, self._dtype = cfg.d_model, llama.dtype_of(cfg)
    self._activations: dict[tuple[str, int], jax.Array] = {}  # (request_id, start) -> x [C, d]

  def submit(self, plan: Plan) -> Pending:
    """Dispatches the plan and returns at once."""
    pending = Pending(decode=plan.decode, saved=self._blocks_saved(plan))
    for i in range(0, len(plan.release), RELEASE_WIDTH):
      freed = _pad(plan.release[i : i + RELEASE_WIDTH], RELEASE_WIDTH, -1)
      self.cache = self.programs.release(self.cache, freed)
    for work in plan.prefill:
      pending.prefilled.append((work, self._prefill(work)))
    if plan.measure:
      pending.measured = (plan.measure, self._measure(plan.measure))
    if plan.decode:
      self.cache, *decoded = self.programs.decode(self.params, self.cache, self._decode_batch(plan.decode))
      pending.decoded = tuple(decoded)
    outputs = (pending.decoded, [x for _, x in pending.prefilled], pending.measured and pending.measured[1])
    for array in jax.tree.leaves(outputs):
      array.copy_to_host_async()
    return pending

  def wait(self) -> None:
    """Blocks until nothing runs any more; a process that ends before that aborts."""
    with contextlib.suppress(RuntimeError):  # arrays of an interrupted dispatch are gone
      jax.block_until_ready(self.cache)

  def forget(self, request_id: str) -> None:
    """Drops what is kept between segments of a prompt that was cancelled."""
    for key in [k for k in self._activations if k[0] == request_id]:
      del self._activations[key]

  def _blocks_saved(self, plan: Plan) -> int:
    """Blocks of all layers and heads that a plan writes to the pool."""
    size, shape = self.shape.S, self.shape
    full = sum(len(w.tokens) // size * w.n_layers for w in plan.prefill)
    return (full + sum((r.position + 1) % size == 0 for r in plan.decode) * shape.L) * shape.K

  def _prefill(self, work: PrefillWork) -> jax.Array:
    size = self.shape.S
    n_tokens, first_block = len(work.tokens), work.start // size
    padded = self.buckets.piece(n_tokens, work.start)
    blocks = work.table[first_block : first_block + n_tokens // size]
    prefix = _pad(work.table[:first_block], self.buckets.table(first_block), -1) if work.start else None
    key = (work.request_id, work.start)
    x = self._activations.pop(key, None)
    if x is None:
      x = jnp.zeros((padded, self._d_model), self._dtype, device=NamedSharding(self.mesh, P()))
    batch = PrefillBatch(
      tokens=_pad(work.tokens, padded, 0),
      start=np.int32(work.start),
      n_tokens=np.int32(n_tokens),
      first_layer=np.int32(work.first_layer),
      n_layers=np.int32(work.n_layers),
      row=np.int32(work.row),
      blocks=_pad(blocks, padded // size, -1),
      prefix=prefix,
      sampling=_sampling_rows([work.sampling], 1),
    )
    self.cache, x, out = self.programs.prefill(self.params, self.cache, x, batch)
    if work.first_layer + work.n_layers < self.shape.L:
      self._activations[key] = x
    return out

  def _measure(self, rows: tuple[DecodeRow, ...]) -> jax.Array:
    batch = self._decode_batch(rows)
    return self.programs.working_sets(self.cache, batch.tables, batch.positions // self.shape.S, batch.steps)

  def _decode_batch(self, rows: tuple[DecodeRow, ...]) -> DecodeBatch:
    n = self.buckets.batch(len(rows))
    width = self.buckets.table(max(r.position // self.shape.S + 1 for r in rows))
    column = lambda values, fill=0: _pad(np.array(list(values), np.int32), n, fill)  # noqa: E731
    tables = np.full((n, width), -1, np.int32)
    for i, row in enumerate(rows):
      tables[i, : len(row.table)] = row.table[:width]
    return DecodeBatch(
      rows=column((r.row for r in rows), self.shape.R),
      positions=column(r.position for r in rows),
      steps=column(r.step for r in rows),
      tables=tables,
      sampling=None if all(r.sampling.plain for r in rows) else _sampling_rows([r.sampling for r in rows], n),
    )


def _pad(values: np.ndarray, n: int, fill: int) -> np.ndarray:
  out = np.full(n, fill, np.int32)
  out[: len(values)] = values
  return out


def _sampling_rows(samplings: list[Sampling], n: int) -> SamplingRows:
  rows = samplings + [Sampling()] * (n - len(samplings))
  return SamplingRows(
    temperature=np.array([r.temperature for r in rows], np.float32),
    top_p=np.array([r.top_p for r in rows], np.float32),
    seeds=np.array([r.seed for r in rows], np.uint32),
    banned=np.stack([_pad(np.array(sorted(r.banned), np.int32), MAX_BANNED, -1) for r in rows]),
  )
