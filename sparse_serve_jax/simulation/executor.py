"""Runs plans in virtual time: what they would produce, after as long as they would take. No token means anything."""

from __future__ import annotations

import dataclasses

from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import EngineConfig, ModelConfig
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.clock import Clock
from sparse_serve_jax.serving.plan import Plan, StepResult, StepStats, blocks_saved
from sparse_serve_jax.simulation.cost import Cost, work_of
from sparse_serve_jax.simulation.reuse import Blocks

TOKEN = 0


@dataclasses.dataclass(frozen=True)
class SimulatedModel:
  """A model that has sizes only. Its requests end by length, since it has no EOS token."""

  config: ModelConfig
  eos_token_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class SimulatedStep:
  """An iteration on its way, which is done at a time of the clock."""

  clock: Clock
  done_at: float
  produced: StepResult

  def result(self) -> StepResult:
    self.clock.sleep_until(self.done_at)
    return self.produced

  def on_delivered(self) -> None:
    """Nothing was held back."""


class SimulatedExecutor:
  """A device that begins an iteration when it is dispatched and the one before is done, as one with a queue does.

  The host's work takes no time of its own: what it adds to an iteration is in the costs that were measured.
  """

  def __init__(self, config: EngineConfig, model_config: ModelConfig, cost: Cost, clock: Clock, vectors: int):
    """Makes an executor.

    Args:
      config: the engine's.
      model_config: sizes of the model.
      cost: of the device.
      clock: the engine's; usually `Virtual`.
      vectors: E of the selection method, for the sizes of the cache.
    """
    config.check_model(model_config)
    self.config, self.model = config, SimulatedModel(model_config)
    self.shape = CacheShape.of(model_config, config, vectors)
    self.buckets = Buckets.of(config, self.shape.L, self.shape.max_context)
    self._seconds, self._clock, self._blocks = cost.seconds, clock, Blocks(config, self.shape, cost.reuse)
    self._done_at = clock.now()  # the last iteration
    self._held = [0] * self.shape.R  # blocks in slots by lane, if there were slots for all

  def begin(self) -> None:
    """What an earlier engine has left is forgotten."""
    self._held = [0] * self.shape.R

  def submit(self, plan: Plan) -> SimulatedStep:
    """Dispatches the plan and returns at once."""
    stats = self._stats(plan)
    start = max(self._clock.now(), self._done_at)
    self._done_at = start + self._seconds.of(work_of(plan, stats, self.shape, self.buckets))
    tokens = {work.request_id: TOKEN for work in plan.works if work.last}
    for row in plan.decode:
      tokens[row.request_id] = TOKEN
    working_sets = {row.request_id: self._blocks.working_set(row) for row in plan.measure}
    return SimulatedStep(self._clock, self._done_at, StepResult(tokens, working_sets, stats))

  def wait(self) -> None:
    """Blocks until nothing runs any more."""
    self._clock.sleep_until(self._done_at)

  def drop(self) -> None:
    """Nothing is held that another would need."""

  def reset(self) -> None:
    """An empty cache, and nothing on its way."""
    self._done_at = self._clock.now()
    self._held = [0] * self.shape.R

  def _stats(self, plan: Plan) -> StepStats:
    shape = self.shape
    for admission in plan.admit:
      self._held[admission.lane] = 0
    before = 0
    for work in plan.works:
      before += self._blocks.before_piece(work, self.buckets.full)
      newest = min(len(work.tokens) // shape.S, self._blocks.newest)
      self._held[work.lane] += newest * work.n_layers * shape.K
    attended, missed = self._blocks.decode(plan.decode) if plan.decode else (0, 0)
    for row in plan.decode:  # misses enter slots; which row's they are does not matter for their sum
      limit = (row.position // shape.S) * shape.L * shape.K
      self._held[row.lane] = min(limit, self._held[row.lane] + missed // len(plan.decode))
    used = min(shape.P, sum(self._held)) if plan.prefill or plan.decode else 0
    return StepStats(attended, missed, before + missed, blocks_saved(plan, shape), used)
