"""What iterations of a real executor took, to fit costs to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.serving.plan import Executor, Observed
from sparse_serve_jax.simulation.cost import Work, work_of


class Iteration(NamedTuple):
  """One that ran."""

  work: Work
  rows: int  # of its decode step, without padding
  full_blocks: int  # of these rows together, of one layer and head
  missed_blocks: int  # of those that they attended to, over layers and heads
  seconds: float


def to_columns(iterations: Sequence[Iteration]) -> dict[str, list[float]]:
  """Iterations as JSON values: a list of each number, seconds in whole microseconds."""
  rows = [(*of.work, *of[1:-1], round(of.seconds, 6)) for of in iterations]
  return {name: [row[i] for row in rows] for i, name in enumerate(_COLUMNS)}


def from_columns(columns: Mapping[str, Any]) -> list[Iteration]:
  """What `to_columns` was given, with its seconds rounded.

  Raises:
    ValueError: a column is missing, or they are not of one length.
  """
  if missing := [name for name in _COLUMNS if name not in columns]:
    raise ValueError(f"iterations lack {', '.join(missing)}")
  n, rows = len(Work._fields), zip(*(columns[name] for name in _COLUMNS), strict=True)
  return [Iteration(Work(*row[:n]), *row[n:]) for row in rows]


_COLUMNS = (*Work._fields, *Iteration._fields[1:])


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

  def __init__(self, executor: Executor):
    self.iterations: list[Iteration] = []
    self._shape = executor.shape
    self._buckets = Buckets.of(executor.config, executor.shape.L, executor.shape.max_context)
    self._last = -math.inf  # when the last one was done

  def observe(self, seen: Observed) -> None:
    """Takes an iteration of an engine."""
    work = work_of(seen.plan, seen.result.stats, self._shape, self._buckets)
    rows = seen.plan.decode
    full = sum(row.position // self._shape.S for row in rows)
    seconds = seen.done - max(seen.planned, self._last)
    self.iterations.append(Iteration(work, len(rows), full, seen.result.stats.missed, seconds))
    self._last = seen.done
