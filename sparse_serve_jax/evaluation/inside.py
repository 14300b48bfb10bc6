"""A look inside a cache that serves: what each decode step selects, what lies in slots, and what a digest hides.

  llm = LLM("models/reference", config="psa")
  watch = inside.watch(llm, opens=lambda row: row.step == 0)
  llm.generate(prompt)
  watch.steps[0].opened.shares   # of the attention mass, by layer, KV head, query head and block

A watch changes nothing that is served. It costs time, since the host reads maps from the device after every iteration.
Maps hold of a block the number of the step that selected it last, and not whose that was. So where several requests
share a block and select it in one iteration, a watch shows this for one of them; and a block that an earlier request
selected last, in its step of the same number, counts as selected.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as kernels
from pallas_kernels.score import across_heads
from pallas_kernels.stop import LOG2_E
from sparse_serve_jax.attention.decode import Selector
from sparse_serve_jax.config import EngineConfig, ModelConfig
from sparse_serve_jax.llm import LLM
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.kv_cache import KVCache
from sparse_serve_jax.models import llama
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import DecodeRow, Dispatched, Observed, Plan


@dataclasses.dataclass(frozen=True)
class Opened:
  """A decode step, computed once more with every key looked at; N are the request's full blocks.

  What it attends to is what the engine attended to, so that a layer's queries are the engine's.
  """

  token: int  # the most likely next one
  scores: np.ndarray  # [L, K, N] float32, of the digests; where group_reduce=softmax, of sinks and window anything
  shares: np.ndarray  # [L, K, G, N] float32, the true share of a query head's attention mass in each block
  tail: np.ndarray  # [L, K, G] float32, the share in the unfinished block
  selected: np.ndarray  # [L, K, N] bool, attended to

  @property
  def mass(self) -> np.ndarray:
    """[L, K, G], the share of the attention mass in what the step attended to, the tail included."""
    return self.tail + np.where(self.selected[:, :, None], self.shares, 0).sum(-1)


@dataclasses.dataclass(frozen=True)
class Step:
  """A decode step of a request; N are its full blocks."""

  request_id: str
  iteration: int  # of the engine; that of `Observed.plan`
  step: int  # decode steps that the request has made before
  position: int  # tokens whose KV is in the cache
  selected: np.ndarray  # [L, K, N] bool, attended to
  resident: np.ndarray  # [L, K, N] bool, in a slot when the iteration began
  opened: Opened | None = None


class Watch:
  """An `Executor` that keeps what it sees: `steps`, and what the engine tells of its `iterations`. See `watch`."""

  def __init__(self, executor: JaxExecutor, opens: Callable[[DecodeRow], bool]):
    self.steps: list[Step] = []
    self.iterations: list[Observed] = []
    self.config, self.model, self.shape = executor.config, executor.model, executor.shape
    self._executor, self._opens = executor, opens
    self._tables: dict[int, np.ndarray] = {}  # of lanes

  def of(self, request_id: str) -> list[Step]:
    """The steps of the request `request_id`."""
    return [step for step in self.steps if step.request_id == request_id]

  def submit(self, plan: Plan) -> Dispatched:
    """Runs a plan and waits for it."""
    for admission in plan.admit:
      self._tables[admission.lane] = admission.table
    resident = [self._by_layer("slot_of", row) >= 0 for row in plan.decode]
    entering = [self._entering(row) if self._opens(row) else None for row in plan.decode]
    dispatched = self._executor.submit(plan)
    for row, there, before in zip(plan.decode, resident, entering, strict=True):
      if row.fills >= 0:  # on demand a table grows, by the steps that fill a block
        self._tables[row.lane] = np.append(self._table(row), row.fills)
      selected = self._by_layer("last_selected", row) == row.step
      opened = None if before is None else self._open(row, before, selected)
      at = row.request_id, plan.iteration, row.step, row.position
      self.steps.append(Step(*at, selected, there, opened))
    return dispatched

  def begin(self) -> None:
    self._executor.begin()

  def wait(self) -> None:
    self._executor.wait()

  def reset(self) -> None:
    self._executor.reset()

  def drop(self) -> None:
    """As that of `JaxExecutor`."""
    self._executor.drop()

  def _table(self, row: DecodeRow) -> np.ndarray:
    """[N], the pool's block of each full block."""
    return self._tables[row.lane][: row.position // self.shape.S]

  def _by_layer(self, name: str, row: DecodeRow) -> np.ndarray:
    """[L, K, N], what a map has of the request's full blocks."""
    of_pool = np.asarray(getattr(self._executor.cache.hot.maps, name))  # whole: a gather is a program for each N
    return of_pool[:, :, self._table(row)].swapaxes(0, 1)

  def _entering(self, row: DecodeRow) -> _Entering:
    """What the step is going to overwrite."""
    hot = self._executor.cache.hot
    return _Entering(np.asarray(hot.last_token[row.lane]), np.asarray(hot.tail[:, :, row.lane]))

  def _open(self, row: DecodeRow, before: _Entering, selected: np.ndarray) -> Opened:
    self._executor.wait()  # blocks that are saved beside the programs are in the pool then
    n, width = selected.shape[-1], self.shape.N  # one program for all lengths
    table, read = np.zeros(width, np.int32), np.zeros((*selected.shape[:2], width), bool)
    table[:n], read[..., :n] = self._table(row), selected
    selector = Selector.of(self.config)
    ranking = kernels.Ranking(selector.method.score, selector.reduce, selector.sinks, selector.window)
    program = _Program(self.model.config, ranking)
    at = np.int32(row.position), table, read
    token, scores, shares, tail = _open(program, self._executor.params, self._executor.cache, before, *at)
    return Opened(int(token), np.asarray(scores)[..., :n], np.asarray(shares)[..., :n], np.asarray(tail), selected)


def watch(llm: LLM, opens: Callable[[DecodeRow], bool] = lambda row: False) -> Watch:
  """Records what an LLM does from now on, by giving it a new engine over the same cache. When that has failed, as by an
  interrupt, the LLM's next engine is not watched.

  Args:
    llm: is idle.
    opens: whether a decode step is opened; that takes about as long as the step does without sparse attention.

  Raises:
    ValueError: requests are running, or nothing is selected, so that blocks have no digests.
    NotImplementedError: the pool lies in host memory that only kernels read.
  """
  executor = llm.engine.executor
  if llm.engine.has_work:
    raise ValueError("an LLM is watched from when it is idle, and requests are running")
  if not isinstance(executor, JaxExecutor):
    raise ValueError("this LLM is watched already")
  if not executor.config.selects:
    raise ValueError(f"with sparse.policy={executor.config.sparse.policy} nothing is selected: blocks have no digests")
  if executor.shape.offload and host_pool.memory_kind() is not None:
    raise NotImplementedError("a cache is looked into where XLA reads its pool: on a CPU, or with cache.offload=false")
  made = Watch(executor, opens)
  llm.engine = Engine(made, observer=made.iterations.append)
  return made


class _Entering(NamedTuple):
  """What a row has before its step."""

  token: np.ndarray  # int32 []
  tail: np.ndarray  # [K, L, 2, S, D]


class _Program(NamedTuple):
  """What is compiled in."""

  model: ModelConfig
  ranking: kernels.Ranking


@functools.partial(jax.jit, static_argnums=0)
def _open(program: _Program, params: llama.Params, cache: KVCache, before: _Entering, position, table, selected):
  """The next token; scores [L, K, N], shares [L, K, G, N] and those of the tail [L, K, G]."""
  cfg, ranking, hot = program.model, program.ranking, cache.hot
  n, size = selected.shape[-1], hot.tail.shape[4]
  block, n_blocks = jnp.arange(n), position // size
  exists, in_tail = block < n_blocks, jnp.arange(size) <= position % size
  ranked = exists & ~ranking.forced(block, n_blocks)
  cos_sin = llama.rope(cfg, position[None])
  highest = lax.Precision.HIGHEST

  def layer(x, of):
    lp, blocks, digests, tail, read = of  # [K, N, 2, S, D], [K, N, E, D], [K, 2, S, D], [K, N]
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    q = q[0].astype(jnp.float32)  # [K, G, D]
    tail = tail.at[:, 0, position % size].set(k[0]).at[:, 1, position % size].set(v[0])
    kv = jnp.concatenate([blocks, tail[:, None]], 1).astype(jnp.float32)  # [K, N + 1, 2, S, D]
    kv = jnp.where(jnp.append(exists, True)[:, None, None, None], kv, 0)
    logits = jnp.einsum("kgd,knsd->kgns", q, kv[:, :, 0], precision=highest) * cfg.head_dim**-0.5
    there = jnp.concatenate([jnp.broadcast_to(exists[:, None], (n, size)), in_tail[None]])
    logits = jnp.where(there, logits, -jnp.inf)
    shares = jax.nn.softmax(logits, (-2, -1)).sum(-1)  # [K, G, N + 1]
    attended = jnp.concatenate([read, jnp.ones_like(read[:, :1])], 1)[:, None, :, None]
    p = jax.nn.softmax(jnp.where(attended, logits, -jnp.inf), (-2, -1))
    o = jnp.einsum("kgns,knsd->kgd", p, jnp.where(there[..., None], kv[:, :, 1], 0), precision=highest)
    x = llama.mlp(cfg, lp, llama.attention_out(lp, x, o[None], None), None)
    scores = across_heads(ranking.rule(q, digests.astype(jnp.float32)), ranked, cfg.head_dim, ranking.reduce)
    return x, (scores, shares[..., :-1], shares[..., -1])

  by_layer = functools.partial(jnp.swapaxes, axis1=0, axis2=1)
  blocks, digests = by_layer(cache.pool[:, :, table]), by_layer(hot.digest[:, :, table])
  first = llama.embed(params, jnp.asarray(before.token)[None])
  x, found = lax.scan(layer, first, (params["layers"], blocks, digests, by_layer(before.tail), selected))
  return llama.logits(cfg, params, x, None)[0].argmax(), *found


def order(opened: Opened, config: EngineConfig) -> np.ndarray:
  """Blocks in the order in which the digests have them read, int32 [L, K, N]: sinks and window first."""
  n, selector = opened.scores.shape[-1], Selector.of(config)
  block = np.arange(n)
  forced = (block < selector.sinks) | (block >= n - selector.window)
  return np.argsort(-np.where(forced, np.inf, opened.scores), -1, kind="stable").astype(np.int32)


def captured(opened: Opened, ids: np.ndarray) -> np.ndarray:
  """The share of the attention mass after each block that is read in the order `ids` [L, K, N]: [L, K, G, N], the tail
  included.
  """
  read = np.take_along_axis(opened.shares, np.broadcast_to(ids[:, :, None], opened.shares.shape), -1)
  return opened.tail[..., None] + read.cumsum(-1)


def best_order(opened: Opened) -> np.ndarray:
  """As `order`, of an oracle: the blocks of a KV head by the mean of its query heads' shares."""
  return np.argsort(-opened.shares.mean(2), -1, kind="stable").astype(np.int32)


def claims(opened: Opened, config: EngineConfig) -> tuple[np.ndarray, np.ndarray]:
  """What PSA's stop test takes a share for after each of J groups, and when it stops.

  Args:
    opened: of any policy: that of `config` is taken for "psa".
    config: has the rule, the threshold and the blocks of a group.

  Returns:
    Shares float32 [L, K, G, J], and the blocks that are read, int32 [L, K].
  """
  selector, size = Selector.of(config), config.sparse.group_blocks
  n = opened.scores.shape[-1]
  n_groups = -(-n // size)
  untested = -(-(selector.sinks + selector.window) // size) * size
  ids = order(opened, config)[:, :, None]
  masses = np.take_along_axis(opened.shares, np.broadcast_to(ids, opened.shares.shape), -1)
  stop = kernels.Stop(config.sparse.fixed_threshold, untested, selector.rule)
  seen, before = opened.tail, jnp.full_like(opened.tail, jnp.inf)
  made, used = [], np.full(masses.shape[:2], n, np.int32)
  for j in range(n_groups):
    group = masses[..., j * size : (j + 1) * size]  # [L, K, G, size]
    seen, end = seen + group.sum(-1), min((j + 1) * size, n)
    logs = jnp.moveaxis(jnp.log(group), -1, -2) * LOG2_E  # [L, K, size, G]
    each = selector.rule.of_group(logs, jnp.ones(logs.shape[:-1], bool))
    each = each if j * size >= untested else jnp.full_like(each, jnp.inf)
    claim, before = selector.rule.claim(before, each, jnp.log(seen) * LOG2_E, jnp.float32(n - end))
    passed = np.asarray(selector.rule.passes(claim, stop.threshold, claim.shape[-1])) & (end >= untested)
    used = np.where(passed, np.minimum(used, end), used)
    made.append(np.asarray(claim))
  return np.stack(made, -1), used


def found(opened: Opened, n: int) -> np.ndarray:
  """Of the `n` blocks with most attention mass, the share that is among the n of best score, sinks and window like all
  others: float64 [L, K].
  """
  by_mass, by_score = (np.argsort(-x, -1, kind="stable")[..., :n] for x in (opened.shares.mean(2), opened.scores))
  return (by_mass[..., None] == by_score[..., None, :]).any(-1).mean(-1)


def working_sets(steps: Sequence[Step], w: int) -> np.ndarray:
  """Blocks over all layers and heads that a request's last `w` steps selected, int64 [steps]."""
  if not steps:
    return np.zeros(0, int)
  width = steps[-1].selected.shape[-1]
  selected = np.stack([_padded(step.selected, width) for step in steps])
  return np.array([selected[max(0, t - w + 1) : t + 1].any(0).sum() for t in range(len(steps))])


def hit_rates(steps: Sequence[Step], slots: Sequence[int], skip: int = 0) -> np.ndarray:
  """The share of the attended blocks that would have been in slots, if slots kept what was used last (LRU).

  Args:
    steps: of one request or several, in the order in which they ran.
    slots: numbers of slots.
    skip: iterations that fill the slots first and are not counted.

  Returns:
    float64 [slots]. Blocks that one layer reads in an iteration count as read at the same time.

  Raises:
    ValueError: there are no steps, or none after those that are skipped attended to a block.
  """
  if not steps:
    raise ValueError("there are no steps")
  width = max(step.selected.shape[-1] for step in steps)
  lane = {name: i for i, name in enumerate(dict.fromkeys(step.request_id for step in steps))}
  n_layers, n_heads = steps[0].selected.shape[:2]
  last = np.full((n_layers, len(lane), n_heads, width), -1)
  now, distances = 0, []
  for i, iteration in enumerate(dict.fromkeys(step.iteration for step in steps)):
    rows = [step for step in steps if step.iteration == iteration]
    for layer in range(n_layers):
      read = np.zeros(last.shape[1:], bool)
      for row in rows:
        read[lane[row.request_id]] = _padded(row.selected[layer], width)
      stamps = last[layer][read]
      # Blocks that were used since then, itself and those of its own call included.
      distance = last.size - np.searchsorted(np.sort(last, None), stamps, side="left")
      if i >= skip:
        distances.append(np.where(stamps < 0, np.iinfo(np.int64).max, distance))
      last[layer][read] = now
      now += 1
  of_all = np.concatenate([np.zeros(0, int), *distances])
  if not of_all.size:
    raise ValueError(f"{skip=} leaves none of {i + 1} iterations that attends to a block")
  return np.array([(of_all <= n).mean() for n in slots])


def _padded(selected: np.ndarray, width: int) -> np.ndarray:
  return np.pad(selected, [(0, 0)] * (selected.ndim - 1) + [(0, width - selected.shape[-1])])
