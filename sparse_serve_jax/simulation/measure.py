"""What iterations of a real executor took, to fit costs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.plan import Observed
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
  """Times the iterations that it observes.

  One begins when it is handed over, or when the result of the one before is read if that is later. While the queue is
  never empty the durations add up to the whole time, the host's work included.
  """

  def __init__(self, config: EngineConfig, shape: CacheShape):
    self.iterations: list[Iteration] = []
    self._shape, self._buckets = shape, Buckets.of(config, shape.L, shape.max_context)
    self._last = -math.inf  # when the last one was done

  def observe(self, seen: Observed) -> None:
    """Takes an iteration of an engine."""
    work = work_of(seen.plan, seen.result.stats, self._shape, self._buckets)
    rows = seen.plan.decode
    full = sum(row.position // self._shape.S for row in rows)
    self.iterations.append(Iteration(work, len(rows), full, seen.done - max(seen.planned, self._last)))
    self._last = seen.done
