"""An engine over a device whose tokens can be computed by hand: see test_engine_fake.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SparseConfig
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.plan import Plan, Sampling, StepResult, StepStats

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


class Ticks:
  """A clock that is a second later whenever it is asked."""

  def __init__(self):
    self.next = 0

  def now(self) -> float:
    self.next += 1
    return self.next - 1

  def sleep_until(self, t: float) -> None:
    self.next = max(self.next, t)


class FakeExecutor:
  """Keeps token ids where a device keeps KV: per layer in the pool's blocks and in each lane's tail.

  A token is computed from what is read back through the block table. So a block with two owners, one reused while an
  earlier plan still reads it, a layer left out or a wrong lane or position changes the tokens. Plans run when results
  are read, in order, as on a device.
  """

  def __init__(self, config: EngineConfig, shape: CacheShape, model: FakeModel | None = None):
    self.config, self.shape, self.model = config, shape, model or FakeModel()
    self.plans: list[Plan] = []
    self.buckets = Buckets.of(config, shape.L, shape.max_context)
    self.not_finite: set[str] = set()  # requests whose next token is none
    self.resets = -1
    self.most_outstanding = 0
    self.reset()

  def reset(self) -> None:
    shape = self.shape
    self.pool = np.full((shape.L, shape.M, S), -1)
    self.tail = np.full((shape.L, shape.R, S), -1)
    self.tables: dict[int, np.ndarray] = {}
    self.last = np.full(shape.R, -1)
    self.kept: dict[int, tuple[str, int, int]] = {}  # by place: request, start, layers done
    self.outstanding: list[int] = []
    self.resets += 1

  def drop(self) -> None:
    """The next `reset` makes all anew."""

  def begin(self) -> None:
    """A block that a plan does not write before it is read would show anyway."""

  def submit(self, plan: Plan) -> _Dispatched:
    assert not plan.empty
    self.plans.append(plan)
    self.outstanding.append(plan.iteration)
    self.most_outstanding = max(self.most_outstanding, len(self.outstanding))
    return _Dispatched(self, plan)

  def wait(self) -> None:
    """Nothing runs here but inside `execute`."""

  def execute(self, plan: Plan) -> StepResult:
    assert self.outstanding.pop(0) == plan.iteration
    self.pool[:, plan.release] = -1
    self.kept = {at: of for at, of in self.kept.items() if of[0] not in plan.preempt}
    self.tables |= {admission.lane: admission.table for admission in plan.admit}
    tokens = {}
    for work in plan.works:
      layers = slice(work.first_layer, work.first_layer + work.n_layers)
      at, of, end = self.buckets.hidden_at(work.start), (work.request_id, work.start), work.first_layer + work.n_layers
      *before, done = self.kept.pop(at, (*of, 0))
      assert work.first_layer == (done if tuple(before) == of else 0)
      if end < self.shape.L:
        self.kept[at] = *of, end
      for i, token in enumerate(work.tokens, work.start):
        self._write(layers, work.lane, i, token)
      if work.last:
        context = self._read(work.lane, work.start + len(work.tokens))
        tokens[work.request_id] = self.last[work.lane] = next_token(context, work.sampling)
    for row in plan.decode:
      if row.token >= 0:
        assert row.token == self.last[row.lane], "decoded again, it is another"
      if row.fills >= 0:
        n, table = row.position // S, self.tables[row.lane]
        self.tables[row.lane] = np.append(table[:n], row.fills)
      self._write(slice(None), row.lane, row.position, self.last[row.lane])
      context = self._read(row.lane, row.position + 1)
      tokens[row.request_id] = self.last[row.lane] = next_token(context, row.sampling)
    n = len(plan.decode)
    stats = StepStats(attended=4 * n, missed=n, loaded=n, saved=1, slots_used=n)
    not_finite = frozenset(self.not_finite & tokens.keys())
    tokens = {name: token for name, token in tokens.items() if name not in not_finite}
    return StepResult(tokens, {row.request_id: 3 for row in plan.measure}, stats, not_finite)

  def _write(self, layers: slice, lane: int, i: int, token: int) -> None:
    self.tail[layers, lane, i % S] = token
    if i % S == S - 1:
      self.pool[layers, self.tables[lane][i // S]] = self.tail[layers, lane]

  def _read(self, lane: int, n: int) -> list[int]:
    full = [self.pool[:, block] for block in self.tables[lane][: n // S]]
    context = np.concatenate([*full, self.tail[:, lane, : n % S]], axis=1)
    assert context.min() >= 0, "read what was never written, or released"
    assert (context == context[0]).all(), "layers disagree"
    return context[0].tolist()


@dataclasses.dataclass
class _Dispatched:
  executor: FakeExecutor
  plan: Plan

  def result(self) -> StepResult:
    return self.executor.execute(self.plan)

  def on_delivered(self) -> None:
    pass


SHAPE = CacheShape(
  K=2, L=2, M=32, P=40, R=6, S=S, D=4, E=2, dtype="float32", offload=True, max_context=64, slab_tokens=64
)


def fake_executor(scheduler: SchedulerConfig | None = None, model: FakeModel | None = None, **sizes) -> FakeExecutor:
  config = EngineConfig(
    cache=CacheConfig(block_tokens=S),
    sparse=SparseConfig(token_budget=8 * S, sink_tokens=S, window_tokens=S),
    scheduler=scheduler or SchedulerConfig(),
  )
  return FakeExecutor(config, dataclasses.replace(SHAPE, **sizes), model)


def fake_engine(
  scheduler: SchedulerConfig | None = None, observer=None, model: FakeModel | None = None, **sizes
) -> tuple[Engine, FakeExecutor]:
  executor = fake_executor(scheduler, model, **sizes)
  return Engine(executor, clock=Ticks(), observer=observer), executor
