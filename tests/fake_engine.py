"""An engine over a device whose tokens can be computed by hand: see test_engine_fake.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection

import numpy as np

from sparse_serve_jax.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SparseConfig
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.plan import Capacity, Plan, Sampling, StepResult, StepStats

S = 8
VOCAB = 97
EOS = 96

MODEL_CONFIG = ModelConfig(
  vocab_size=VOCAB, d_model=8, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8, max_context=64
)
GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class FakeModel:
  config: ModelConfig = MODEL_CONFIG
  eos_token_ids: tuple[int, ...] = (EOS,)


def next_token(context: list[int], sampling: Sampling = GREEDY) -> int:
  """Depends on every token and its place, and never is EOS. A banned one gives way to the next."""
  seed = sampling.seed if sampling.temperature else 0
  token = (sum((i + 1) * token for i, token in enumerate(context)) + seed) % EOS
  while token in sampling.banned:
    token = (token + 1) % EOS
  return token


def continuation(
  prompt: list[int], n: int, sampling: Sampling = GREEDY, stops: Collection[int] = (), min_tokens: int = 0
) -> list[int]:
  """n tokens, or those before the first of `stops`, which is none of the first `min_tokens`."""
  context = list(prompt)
  for i in range(n):
    banned = dataclasses.replace(sampling, banned=frozenset(stops))
    token = next_token(context, banned if i < min_tokens else sampling)
    if token in stops:
      break
    context.append(token)
  return context[len(prompt) :]


class FakeExecutor:
  """Keeps token ids where a device keeps KV: per layer in the pool's blocks and in each row's tail.

  A token is computed from what is read back through the block table. So a block with two owners, one reused while an
  earlier plan still reads it, a layer left out or a wrong row or position changes the tokens. Plans run when results
  are read, in order, as on a device.
  """

  def __init__(self, capacity: Capacity):
    self.capacity = capacity
    self.pool = np.full((capacity.n_layers, capacity.pool_blocks, S), -1)
    self.tail = np.full((capacity.n_layers, capacity.rows, S), -1)
    self.last = np.full(capacity.rows, -1)
    self.kept: dict[tuple[str, int], int] = {}  # (request, start) -> layers done
    self.forgotten: list[str] = []
    self.plans: list[Plan] = []
    self.outstanding: list[int] = []
    self.most_outstanding = 0

  def submit(self, plan: Plan) -> _Pending:
    assert not plan.empty
    self.plans.append(plan)
    self.outstanding.append(plan.iteration)
    self.most_outstanding = max(self.most_outstanding, len(self.outstanding))
    return _Pending(self, plan)

  def wait(self) -> None:
    """Nothing runs here but inside `execute`."""

  def forget(self, request_id: str) -> None:
    self.forgotten.append(request_id)

  def execute(self, plan: Plan) -> StepResult:
    assert self.outstanding.pop(0) == plan.iteration
    self.pool[:, plan.release] = -1
    tokens = {}
    for work in plan.prefill:
      layers = slice(work.first_layer, work.first_layer + work.n_layers)
      assert self.kept.pop((work.request_id, work.start), 0) == work.first_layer
      if work.first_layer + work.n_layers < self.capacity.n_layers:
        self.kept[work.request_id, work.start] = work.first_layer + work.n_layers
      for i, token in enumerate(work.tokens, work.start):
        self._write(layers, work.table, work.row, i, token)
      if work.last:
        context = self._read(work.table, work.row, work.start + len(work.tokens))
        tokens[work.request_id] = self.last[work.row] = next_token(context, work.sampling)
    for row in plan.decode:
      self._write(slice(None), row.table, row.row, row.position, self.last[row.row])
      context = self._read(row.table, row.row, row.position + 1)
      tokens[row.request_id] = self.last[row.row] = next_token(context, row.sampling)
    n = len(plan.decode)
    stats = StepStats(attended=4 * n, missed=n, loaded=n, saved=1, slots_used=n)
    return StepResult(tokens, {row.request_id: 3 for row in plan.measure}, stats)

  def _write(self, layers: slice, table: np.ndarray, row: int, i: int, token: int) -> None:
    self.tail[layers, row, i % S] = token
    if i % S == S - 1:
      self.pool[layers, table[i // S]] = self.tail[layers, row]

  def _read(self, table: np.ndarray, row: int, n: int) -> list[int]:
    full = [self.pool[:, block] for block in table[: n // S]]
    context = np.concatenate([*full, self.tail[:, row, : n % S]], axis=1)
    assert context.min() >= 0, "read what was never written, or released"
    assert (context == context[0]).all(), "layers disagree"
    return context[0].tolist()


@dataclasses.dataclass
class _Pending:
  executor: FakeExecutor
  plan: Plan

  def result(self) -> StepResult:
    return self.executor.execute(self.plan)


def fake_engine(scheduler: SchedulerConfig | None = None, observer=None, **changes) -> tuple[Engine, FakeExecutor]:
  capacity = Capacity(
    pool_blocks=32, slots=40, rows=6, max_context=64, n_layers=2, n_kv_heads=2, block_bytes=64, fixed_hbm_bytes=100
  )
  config = EngineConfig(
    cache=CacheConfig(block_tokens=S),
    sparse=SparseConfig(token_budget=8 * S, sink_tokens=S, window_tokens=S),
    scheduler=scheduler or SchedulerConfig(),
  )
  executor = FakeExecutor(dataclasses.replace(capacity, **changes))
  return Engine(config, FakeModel(), executor, clock=itertools.count().__next__, observer=observer), executor
