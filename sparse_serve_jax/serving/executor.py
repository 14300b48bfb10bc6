"""Runs plans on the devices: numpy in, jitted programs, numpy out one iteration late."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import math
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_serve_jax import runtime
from sparse_serve_jax.attention import drawn  # noqa: F401  benchmarks may name its methods
from sparse_serve_jax.attention.audit import AuditAt
from sparse_serve_jax.attention.methods import get_method
from sparse_serve_jax.buckets import Buckets, DecodeProgram, PrefillProgram, Program
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory import host_pool, kv_cache
from sparse_serve_jax.memory.create import create
from sparse_serve_jax.memory.host_pool import HostPool
from sparse_serve_jax.memory.kv_cache import KVCache
from sparse_serve_jax.memory.pinned import pinned_buffer
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.memory.writer import Writer
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import Model, place_params
from sparse_serve_jax.programs import check_variants, implementation_of, programs
from sparse_serve_jax.serving import budget, sizes
from sparse_serve_jax.serving.plan import (
  MAX_BANNED,
  Admission,
  Audited,
  AuditOf,
  DecodeRow,
  Plan,
  PrefillCall,
  PrefillWork,
  Sampling,
  StepResult,
  StepStats,
  TokenLogprobs,
  blocks_saved,
)
from sparse_serve_jax.step import (
  NOT_FINITE,
  DecodeBatch,
  PrefillBatch,
  SamplingRows,
  Setup,
  StepCounts,
  StepOutput,
)

runtime.configure()  # for who imports this module and not the package's names: without it XLA copies all weights

RELEASED_AT_ONCE, ADMITTED_AT_ONCE = 1024, 8  # blocks, and requests, of one call of their program
COMPILED_AT_ONCE = min(8, os.cpu_count() or 1)  # programs
_NOTHING = "nothing"  # a request, for programs that run on none
_NO_BLOCKS = np.zeros(0, np.int32)
# Of executors, also of those that nobody has any more: a result of the last program, and what that calls on the host.
_LAST: dict[int, tuple[weakref.ref[JaxExecutor], Any, HostPool | None]] = {}
_NUMBERS = itertools.count()


@atexit.register
def _end() -> None:
  """Waits for what still runs: a process that ends before that aborts.

  No finalizer of an executor could. Garbage collection comes anywhere: where its thread has a lock that the waiting
  needs, or where JAX takes a traceback, which a call of JAX then breaks (a crash, later; jaxlib 0.10.2, Python 3.11).
  """
  for executor, last, _ in _LAST.copy().values():
    with contextlib.suppress(RuntimeError):  # it has failed
      last.block_until_ready() if (of := executor()) is None else of.wait()


@dataclasses.dataclass
class DispatchedStep:
  """A dispatched iteration. Its arrays are on their way; `result` waits for them."""

  iteration: int
  saved: int
  writer: Writer | None  # of saves beside the programs
  await_saves: bool = False
  prefilled: list[tuple[tuple[PrefillWork, ...], StepOutput]] = dataclasses.field(default_factory=list)
  measured: tuple[tuple[DecodeRow, ...], jax.Array] | None = None
  decoded: tuple[tuple[DecodeRow, ...], StepOutput] | None = None
  done: list[jax.Array] = dataclasses.field(default_factory=list)  # of programs that have no other result

  def copy_to_host(self) -> None:
    """Starts all copies that `result` waits for."""
    measured, decoded = self.measured and self.measured[1], self.decoded and self.decoded[1]
    for array in jax.tree.leaves((self.done, [output for _, output in self.prefilled], measured, decoded)):
      array.copy_to_host_async()

  def result(self) -> StepResult:
    jax.block_until_ready(self.done)
    tokens: dict[str, int] = {}
    logprobs: dict[str, TokenLogprobs] = {}
    loaded = 0
    last = StepCounts(0, 0, 0, 0)
    for works, output in self.prefilled:
      last = _counts(output)
      loaded += last.loaded
      if works[0].last:  # of several all are
        tokens |= _tokens(works, output)
        logprobs |= _logprobs(works, output)
    attended, missed, audit = 0, 0, None
    if self.decoded is not None:
      rows, output = self.decoded
      last = _counts(output)
      attended, missed, loaded = last.attended, last.missed, loaded + last.loaded
      tokens |= _tokens(rows, output)
      logprobs |= _logprobs(rows, output)
      audit = output.audit and Audited(*map(np.asarray, output.audit))
    working_sets = {}
    if self.measured is not None:
      rows, counts = self.measured
      working_sets = {row.request_id: int(c) for row, c in zip(rows, np.asarray(counts), strict=False)}
    landed = None if self.writer is None else self.writer.landed(self.iteration, wait=self.await_saves)
    not_finite = frozenset(name for name, token in tokens.items() if token == NOT_FINITE)
    return StepResult(
      tokens={name: token for name, token in tokens.items() if name not in not_finite},
      working_sets=working_sets,
      stats=StepStats(attended, missed, loaded, self.saved, last.slots_used),
      not_finite=not_finite,
      landed=landed,
      logprobs=logprobs,
      audit=audit,
    )

  def on_delivered(self) -> None:
    if self.writer is not None:
      self.writer.start(self.iteration)


def _counts(output: StepOutput) -> StepCounts:
  return StepCounts(*np.asarray(output.counts).tolist())


def _tokens(rows: Sequence[PrefillWork | DecodeRow], output: StepOutput) -> dict[str, int]:
  """By request."""
  return {row.request_id: int(t) for row, t in zip(rows, np.asarray(output.tokens), strict=False)}


def _logprobs(rows: Sequence[PrefillWork | DecodeRow], output: StepOutput) -> dict[str, TokenLogprobs]:
  """By request, of those that want them."""
  if output.logprobs is None:
    return {}
  token, ids, top = (np.asarray(part).tolist() for part in output.logprobs)
  return {
    row.request_id: TokenLogprobs(token[i], dict(zip(ids[i], top[i], strict=True)))
    for i, row in enumerate(rows)
    if row.sampling.logprobs
  }


class JaxExecutor:
  """Holds weights, cache and the activations of a prompt that is between two segments.

  Raises:
    ValueError: a byte budget is too small or does not fit, `tp` does not divide the model or exceeds the devices there
      are, or the configuration names a variant that there is not, or one whose results have a wrong shape.
    NotImplementedError: the implementation does not run here, or cannot read where the pool lies; or loads or saves are
      staged, and JAX has several processes.
  """

  def __init__(self, config: EngineConfig, model: Model, sharing: int = 1):
    """Places weights and an empty cache. `sharing` executors of processes of this host take alike of what sizes that
    are left open are made of.
    """
    config.check_model(model.config)
    if not model.name.startswith("random:"):
      config.sparse.refuse_drawn(f"{model.name}, whose weights are not random")
    config = host_pool.chosen(config)
    self.mesh = make_mesh(config.tp)
    cfg = model.config
    implementation = implementation_of(config, cfg.head_dim)
    cudnn = implementation == "triton" and cfg.dtype == "bfloat16"
    config = sizes.resolve_here(config, model, self.mesh, cudnn, sharing)
    self.config, self.model = config, model
    self.shape = CacheShape.of(cfg, config, get_method(config.sparse.method).vectors)
    self.buckets = Buckets.of(config, cfg.n_layers, self.shape.max_context)
    setup = Setup.of(cfg, config, implementation)
    check_variants(config, setup, self.shape)
    self.programs = programs(setup, self.mesh)
    budget.check(budget.Needs.of(cfg, config, self.shape, self.buckets, cudnn), model, self.mesh)
    self.params = place_params(model, self.mesh)
    self._host: HostPool | None = None
    self._writer: Writer | None = None
    self._tables: dict[int, np.ndarray] = {}  # of lanes
    self._empty = True  # no plan has used the cache
    self._results: deque[Any] = deque()  # of the program that was called last
    self._number = next(_NUMBERS)
    for number, (executor, last, _) in _LAST.copy().items():
      if executor() is None and last.is_ready():
        _LAST.pop(number, None)
    self._hidden: jax.Array | None  # [A, d], of the prompt that is between two segments
    self.cache: Any = self._create()

  def begin(self) -> None:
    """Before an engine's first plan, while nothing runs: what an earlier one has left in the cache is forgotten."""
    if self._writer is not None:
      self._writer.forget()  # whose saves outlive their requests, and are known by the earlier engine's iterations
    if not self._empty:
      self._release_and_admit(np.arange(self.shape.M, dtype=np.int32))
    self._empty = True

  def submit(self, plan: Plan) -> DispatchedStep:
    """Dispatches the plan and returns at once. Raises what JAX does, after which only `reset` can follow."""
    self._empty = False
    step = DispatchedStep(plan.iteration, blocks_saved(plan, self.shape), self._writer, plan.await_saves)
    self._follow_pool()
    step.done += self._release_and_admit(plan.release, plan.idle, plan.admit)
    for piece in plan.prefill:
      step.prefilled.append((piece.works, self._prefill(piece, plan.iteration)))
    if plan.measure:
      step.measured = plan.measure, self._measure(plan.measure)
    if plan.decode:
      step.decoded = plan.decode, self._decode(plan.decode, plan.threshold, plan.audit)
    step.copy_to_host()
    return step

  def wait(self) -> None:
    """Blocks until nothing runs any more."""
    if self._writer is not None:
      self._writer.drain()
    for array in jax.tree.leaves((self.cache, [*self._results])):
      with contextlib.suppress(RuntimeError):  # a program has taken it, or has failed
        array.block_until_ready()

  def reset(self) -> None:
    """After a failure: an empty cache, and nothing on its way. Raises if the device cannot go on."""
    self.drop()  # whose memory is what the new one takes
    self.cache = jax.block_until_ready(self._create())

  def drop(self) -> None:
    """Gives up the cache: only `reset` can follow, whoever still has this executor."""
    self.wait()  # threads write to the pool's memory until then
    self._results.clear()
    self.cache = self._hidden = None

  def _create(self) -> KVCache:
    """An empty cache, whose pool the host knows if it takes part in moves; and room for activations."""
    cfg, everywhere = self.model.config, NamedSharding(self.mesh, P())
    dims = math.prod(self.buckets.hidden), cfg.d_model
    self._hidden = jnp.zeros(dims, cfg.dtype, device=everywhere) if dims[0] else None
    cache = create(self.shape, self.mesh)
    if "staged" not in (self.config.cache.load, self.config.cache.save):
      return cache
    if jax.process_count() > 1:
      raise NotImplementedError("staged loads and saves are for one process: set cache.load and cache.save to others")
    self._host = HostPool(self.mesh.size, pinned_buffer if host_pool.memory_kind() else None)
    if self.config.cache.save == "staged":
      self._writer = Writer(self._host, self.shape.saving_bytes // 2)
    number = jax.device_put(self._host.numbers, kv_cache.cache_shardings(self.mesh, self.shape.offload).hot.pool_id)
    return cache.replace(hot=cache.hot.replace(pool_id=number))

  def compile(self, prompts: Iterable[int], sampled: bool = False, shared: bool = True) -> int:
    """Compiles what serving prompts of so many tokens needs, so that no time of it is in what is measured then.

    Each program runs once, on nothing: no row, no block, and no layer unless it knows how many.

    Args:
      prompts: lengths in tokens.
      sampled: also where tokens are drawn, and not the most likely ones taken.
      shared: also where a prompt begins like another (`prefix.begin_alike`), with `cache.prefix`.

    Returns:
      The number of programs.
    """
    fit = [n for n in prompts if n < self.shape.max_context]  # others are refused
    needed = [of for of in self.buckets.programs_of(fit, shared) if sampled or not of.sampled]
    audits = (None, AuditOf(0, 0)) if self.config.sparse.audit_share else (None,)
    self._follow_pool()
    self._release_and_admit(admitted=[Admission(_NOTHING, 0, np.full(self.shape.N, -1, np.int32))])
    # XLA takes one core for most of a program, so several are compiled at a time; a call then finds what has been.
    pool = ThreadPoolExecutor(COMPILED_AT_ONCE)
    try:
      nothing = self._measure_operands(self._no_rows(self.buckets.measure))
      lowered = [program for of in needed for program in self._lowered(of, audits)]
      lowered.append(self.programs.working_sets.lower(self.cache.hot, *nothing))
      compiling = [pool.submit(program.compile) for program in lowered]
      for program in compiling:
        program.result()
    finally:
      pool.shutdown(cancel_futures=True)  # an interrupt waits for those alone that have begun
    for of in needed:
      if isinstance(of, PrefillProgram):
        self._prefill(self._no_prompts(of), iteration=0)
        continue
      for audit in audits:
        self._decode(self._no_rows(of), audit=audit)
    self._measure(self._no_rows(self.buckets.measure))
    self.wait()
    return len(needed) + 2 + (len(audits) - 1) * sum(isinstance(of, DecodeProgram) for of in needed)

  def _lowered(self, of: Program, audits: Sequence[AuditOf | None]) -> Iterator[jax.stages.Lowered]:
    """What `compile` runs of a program, and what belongs to it, ready to be compiled."""
    if isinstance(of, PrefillProgram):
      batch, width = self._prefill_operands(self._no_prompts(of))
      hidden = self._hidden if batch.static_layers < self.shape.L else None
      yield self.programs.prefill.lower(self.params, self.cache, hidden, batch, width)
      return
    for audit in audits:
      yield self.programs.decode.lower(self.params, self.cache, *self._decode_operands(self._no_rows(of), audit=audit))

  def _no_prompts(self, of: PrefillProgram) -> PrefillCall:
    """What a prefill program does on nothing."""
    size, sampling = self.shape.S, Sampling(temperature=float(of.sampled))
    lengths = (of.tokens - size, size) if of.packed else (of.tokens,)
    n_layers = of.n_layers if of.static else 0
    tokens = (np.zeros(n, np.int32) for n in lengths)
    works = (PrefillWork(_NOTHING, 0, t, of.table * size, 0, n_layers, False, sampling) for t in tokens)
    return PrefillCall(of, tuple(works))

  def _no_rows(self, of: DecodeProgram) -> tuple[DecodeRow, ...]:
    """Rows of a decode program on nothing."""
    sampling = Sampling(temperature=float(of.sampled))
    return (DecodeRow(_NOTHING, self.shape.R, (of.table - 1) * self.shape.S, 0, sampling),) * of.rows

  def _follow_pool(self) -> None:
    """Before programs whose blocks the host moves."""
    if self._host is not None:
      self._host.follow(self.cache.pool)

  def _release_and_admit(
    self, freed: np.ndarray = _NO_BLOCKS, idle: np.ndarray = _NO_BLOCKS, admitted: Sequence[Admission] = ()
  ) -> list[jax.Array]:
    """Several calls if there are many. Their order does not matter: releases change maps, and admissions tables."""
    n, a = RELEASED_AT_ONCE, ADMITTED_AT_ONCE
    done = []
    for i in range(max(-(-len(freed) // n), -(-len(idle) // n), -(-len(admitted) // a))):
      released = [_pad(blocks[i * n : (i + 1) * n], n, -1) for blocks in (freed, idle)]
      now = admitted[i * a : (i + 1) * a]
      tables = np.full((a, self.shape.N), -1, np.int32)
      for row, admission in zip(tables, now, strict=False):
        row[: len(admission.table)] = self._tables[admission.lane] = admission.table
      lanes = _pad(np.array([admission.lane for admission in now]), a, self.shape.R)
      hot, ran = self._call(self.programs.release_and_admit, self.cache.hot, *released, lanes, tables)
      self.cache = self.cache.replace(hot=hot)
      done.append(ran)
    return done

  def _call(self, program: Any, *operands: Any) -> Any:
    """Results of a program. An interrupt loses none once it has been compiled: no Python runs between the call and the
    place where they are kept. `wait` finds them there, and threads their pool.
    """
    self._results.clear()
    try:
      self._results.extend(itertools.starmap(program, [operands]))
    except BaseException:
      if self._writer is not None:
        self._writer.lose_pool()
      raise
    _LAST[self._number] = weakref.ref(self), jax.tree.leaves(self._results[0])[-1], self._host
    return self._results[0]

  def _prefill(self, piece: PrefillCall, iteration: int) -> StepOutput:
    work, (batch, width) = piece.works[0], self._prefill_operands(piece)
    if self._writer is not None:
      blocks = len(batch.tokens) // self.shape.S * batch.slab_layers * self.shape.K
      self._writer.make_room(blocks * self.shape.block_bytes)
    some = batch.static_layers < self.shape.L
    operands = self.params, self.cache, self._hidden if some else None, batch, width
    self.cache, hidden, slab, output = self._call(self.programs.prefill, *operands)
    self._hidden = hidden if some else self._hidden
    if self._writer is not None and slab is not None:
      layers = range(work.first_layer, work.first_layer + work.n_layers)
      self._writer.save(iteration, slab, layers, self._blocks_of(piece.works), alive=self)
    return output

  def _prefill_operands(self, piece: PrefillCall) -> tuple[PrefillBatch, int]:
    """The batch of a piece, padded, and how many entries of a block table come before it."""
    program, works = piece
    work, samplings = works[0], [w.sampling for w in works]
    rows, tokens = self.buckets.packed_rows if program.packed else 1, np.zeros(program.tokens, np.int32)
    begins = [0, *np.cumsum([self.buckets.in_blocks(len(w.tokens)) for w in works[:-1]])]
    for begin, w in zip(begins, works, strict=True):
      tokens[begin : begin + len(w.tokens)] = w.tokens
    batch = PrefillBatch(
      tokens=tokens,
      start=np.int32(work.start),
      begins=_pad(np.array(begins), rows, program.tokens),
      n_tokens=_pad(np.array([len(w.tokens) for w in works]), rows, 0),
      first_layer=np.int32(work.first_layer),
      n_layers=np.int32(work.n_layers),
      hidden_at=np.int32(self.buckets.hidden_at(work.start)),
      lanes=_pad(np.array([w.lane for w in works]), rows, self.shape.R),
      # A draw for one row takes no time that counts, for those of a pack it does.
      sampling=None if program.packed and not program.sampled else _sampling_rows(samplings, rows),
      static_layers=program.n_layers if program.static else 0,
      slab_layers=0 if self._writer is None or program.unstaged else program.n_layers,
      logprobs=any(of.logprobs for of in samplings) and work.first_layer + work.n_layers == self.shape.L,
    )
    return batch, program.table

  def _blocks_of(self, works: tuple[PrefillWork, ...]) -> np.ndarray:
    """Where in the pool the blocks of a piece go, int32; -1: one that is not full."""
    parts = []
    for work in works:
      n_full, first = len(work.tokens) // self.shape.S, work.start // self.shape.S
      n_begun = self.buckets.in_blocks(len(work.tokens)) // self.shape.S
      parts.append(_pad(self._tables[work.lane][first : first + n_full], n_begun, -1))
    return np.concatenate(parts)

  def _decode(
    self, rows: tuple[DecodeRow, ...], threshold: float | None = None, audit: AuditOf | None = None
  ) -> StepOutput:
    operands = self._decode_operands(rows, threshold, audit)
    self.cache, output = self._call(self.programs.decode, self.params, self.cache, *operands)
    return output

  def _decode_operands(
    self, rows: tuple[DecodeRow, ...], threshold: float | None = None, audit: AuditOf | None = None
  ) -> tuple[DecodeBatch, int]:
    sampled = not all(r.sampling.plain for r in rows)
    longest = max(r.position // self.shape.S + 1 for r in rows)
    batch, width = self._decode_batch(rows, self.buckets.decode(len(rows), longest, sampled))
    sparse = self.config.sparse
    if sparse.policy == "psa":
      batch = batch.replace(threshold=np.float32(sparse.promise if threshold is None else threshold))
    if audit is not None:
      batch = batch.replace(audit=AuditAt(np.int32(audit.row), np.int32(audit.layer)))
    return batch, width

  def _measure(self, rows: tuple[DecodeRow, ...]) -> jax.Array:
    """Working sets of the rows."""
    return self._call(self.programs.working_sets, self.cache.hot, *self._measure_operands(rows))

  def _measure_operands(self, rows: tuple[DecodeRow, ...]) -> tuple[DecodeBatch, int]:
    batch, width = self._decode_batch(rows, self.buckets.measure)
    return batch.replace(logprobs=False), width  # which it does not read

  def _decode_batch(self, rows: tuple[DecodeRow, ...], program: DecodeProgram) -> tuple[DecodeBatch, int]:
    """The batch, padded, and how many entries of block tables it looks at."""

    def column(values, fill=0):
      return _pad(np.array(list(values), np.int32), program.rows, fill)

    batch = DecodeBatch(
      lanes=column((r.lane for r in rows), self.shape.R),
      positions=column(r.position for r in rows),
      steps=column(r.step for r in rows),
      fills=column((r.fills for r in rows), -1),
      tokens=column((r.token for r in rows), -1),
      sampling=_sampling_rows([r.sampling for r in rows], program.rows) if program.sampled else None,
      logprobs=any(r.sampling.logprobs for r in rows),
    )
    return batch, program.table


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
    top_k=np.array([r.top_k for r in rows], np.int32),
    min_p=np.array([r.min_p for r in rows], np.float32),
  )
