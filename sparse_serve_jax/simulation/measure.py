"""What iterations of a real executor took, to fit costs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.serving.clock import Clock
from sparse_serve_jax.serving.plan import Executor, Plan, StepResult
from sparse_serve_jax.simulation.cost import Work, work_of


class Iteration(NamedTuple):
  """One that ran."""

  work: Work
  rows: int  # of its decode step, without padding
  full_blocks: int  # of these rows together, of one layer and head
  seconds: float


def typical(passes: Sequence[Sequence[Iteration]]) -> list[float]:
  """Seconds of each iteration, of passes that planned the same.

  They are medians, which outliers do not move, made so much longer or shorter that they add up to the median pass:
  disturbances only make iterations longer, so without that the sum would be too short, and a simulated queue much too
  short.
  """
  seconds = np.array([[iteration.seconds for iteration in one] for one in passes])
  middle = np.median(seconds, 0)
  return (middle * (np.median(seconds.sum(1)) / middle.sum())).tolist()


class Stopwatch:
  """Times iterations when their results are read.

  One begins when it is handed over, or when the result of the one before is read if that is later. While the queue is
  never empty the durations add up to the whole time, the host's work included.
  """

  def __init__(self, executor: Executor, clock: Clock):
    shape = executor.shape
    self.iterations: list[Iteration] = []
    self._clock, self._shape = clock, shape
    self._buckets = Buckets.of(executor.config, shape.L, shape.max_context)
    self._last = clock.now()
    self.executor = cast(Executor, _Timed(executor, self))  # to make an engine over

  def read(self, plan: Plan, handed_over: float, result: StepResult) -> None:
    """Takes an iteration whose result has just been read."""
    now = self._clock.now()
    work = work_of(plan, result.stats, self._shape, self._buckets)
    full = sum(row.position // self._shape.S for row in plan.decode)
    self.iterations.append(Iteration(work, len(plan.decode), full, now - max(handed_over, self._last)))
    self._last = now


class _Timed:
  """An executor whose iterations a stopwatch sees."""

  def __init__(self, executor: Executor, stopwatch: Stopwatch):
    self._executor, self._stopwatch = executor, stopwatch

  def __getattr__(self, name: str) -> Any:
    return getattr(self._executor, name)

  def submit(self, plan: Plan) -> _TimedStep:
    now = self._stopwatch._clock.now()
    return _TimedStep(self._executor.submit(plan), plan, now, self._stopwatch)


@dataclasses.dataclass(frozen=True)
class _TimedStep:
  """An iteration on its way, whose result is read once."""

  step: Any
  plan: Plan
  handed_over: float
  stopwatch: Stopwatch

  def result(self) -> StepResult:
    result = self.step.result()
    self.stopwatch.read(self.plan, self.handed_over, result)
    return result
