"""How long an iteration takes: seconds for each unit of what it does, fitted to iterations that were measured.

  cost = read_cost("cost.json")
  seconds = cost.seconds.of(work)

The file of a cost is strict JSON. `Cost.about` says what was measured: for another model, device or configuration of
kernels the numbers mean nothing.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import check_fields, read_config
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.plan import Plan, StepStats
from sparse_serve_jax.simulation.reuse import Reuse


class Work(NamedTuple):
  """What an iteration does, in the units that `Seconds` prices. Tokens and rows are padded, as a device runs them."""

  iterations: int  # 1
  programs: int  # besides the decode step: pieces of prompts, a release with admissions, a measurement
  prefill_tokens: int  # token x layers of the pieces
  prefill_pairs: int  # of these, pairs with what each attends to: half of its piece, and all before that
  decodes: int  # 1 if there is a decode step, which reads all weights
  decode_rows: int
  table_blocks: int  # entries of the block tables that a decode step looks at, over its rows
  attended_blocks: int  # the rest over layers and KV heads
  loaded_blocks: int
  saved_blocks: int


def work_of(plan: Plan, stats: StepStats, shape: CacheShape, buckets: Buckets) -> Work:
  """The work of a plan, with the blocks that its result counts or, in a simulation, will count."""
  tokens = pairs = 0
  for program, works in plan.prefill:
    first, n = works[0], program.tokens
    tokens += n * first.n_layers
    if program.packed:
      pairs += sum(len(work.tokens) ** 2 // 2 for work in works) * shape.L
    else:
      pairs += n * (first.start + n // 2) * first.n_layers
  rows = width = 0
  if plan.decode:
    program = buckets.decode(len(plan.decode), max(row.position for row in plan.decode) // shape.S + 1)
    rows, width = program.rows, program.table
  return Work(
    iterations=1,
    programs=len(plan.prefill) + bool(plan.measure) + bool(plan.release.size or plan.idle.size or plan.admit),
    prefill_tokens=tokens,
    prefill_pairs=pairs,
    decodes=int(rows > 0),
    decode_rows=rows,
    table_blocks=rows * width,
    attended_blocks=stats.attended,
    loaded_blocks=stats.loaded,
    saved_blocks=stats.saved,
  )


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Seconds of each unit of `Work`, whose fields these are."""

  SECTION = "seconds"

  iterations: float
  programs: float
  prefill_tokens: float
  prefill_pairs: float
  decodes: float
  decode_rows: float
  table_blocks: float
  attended_blocks: float
  loaded_blocks: float
  saved_blocks: float

  def __post_init__(self):
    check_fields(self, not_negative=Work._fields)
    if not any(self.prices):
      raise ValueError("seconds: every value is 0, so that no time would pass")

  @property
  def prices(self) -> tuple[float, ...]:
    """In the order of `Work`."""
    return tuple(getattr(self, name) for name in Work._fields)

  def of(self, work: Work) -> float:
    return sum(price * n for price, n in zip(self.prices, work, strict=True))


@dataclasses.dataclass(frozen=True)
class About:
  """What a cost was fitted on."""

  SECTION = "about"

  model: str
  dtype: str
  device: str
  config: str  # the engine's configuration, as JSON
  workload: str  # as JSON
  selections: str  # traces of `reuse`
  iterations: int  # measured
  mean_error: float  # of an iteration: mean of |predicted - measured| / mean of measured
  total_error: float  # of all together: |sum of predicted - sum of measured| / sum of measured

  def __post_init__(self):
    check_fields(self, positive=("iterations",), not_negative=("mean_error", "total_error"))


@dataclasses.dataclass(frozen=True)
class Cost:
  """All that a simulation knows of a device and of a model's attention."""

  about: About
  seconds: Seconds
  reuse: Reuse


def read_cost(file: str | pathlib.Path) -> Cost:
  """Reads a cost.

  Raises:
    ValueError: there is no such file, or something in it is wrong; names the file, the field and its value.
  """
  if not pathlib.Path(file).is_file():
    raise ValueError(f"{file} is no file")
  return read_config(Cost, pathlib.Path(file))


class Fit(NamedTuple):
  seconds: Seconds
  mean_error: float  # as in `About`
  total_error: float


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Fit:
  """Prices, none below 0, of iterations that took `seconds`.

  The squares are of errors over the square root of what is predicted: long iterations decide how long a run takes, but
  must not be all that counts. So the predictions also add up to what was measured.

  Raises:
    ValueError: there are fewer iterations than prices, or a duration is not above 0.
  """
  x, y = np.asarray(works, np.float64), np.asarray(seconds, np.float64)
  if x.shape != (len(y), len(Work._fields)) or len(x) < len(Work._fields):
    raise ValueError(f"{len(Work._fields)} prices need as many iterations or more, got {len(x)} and {len(y)} durations")
  if none := int((~(np.isfinite(y) & (y > 0))).sum()):
    raise ValueError(f"every iteration takes some time, {none} of {len(y)} durations are none")
  scale = np.maximum(x.max(0), 1)  # so that columns are of one size
  predicted = y
  for _ in range(20):  # the weights settle within a few
    weight = 1 / np.sqrt(np.maximum(predicted, 0.01 * y))
    prices = not_negative_least_squares(x / scale * weight[:, None], y * weight) / scale
    predicted = x @ prices
  return Fit(
    Seconds(**dict(zip(Work._fields, prices.tolist(), strict=True))),
    float(np.abs(predicted - y).mean() / y.mean()),
    abs(float(predicted.sum() / y.sum()) - 1),
  )


def not_negative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """x [n], none below 0, with the least |a x - b|; a [m, n], b [m].

  Lawson and Hanson, Solving Least Squares Problems, chapter 23.
  """
  n = a.shape[1]
  x, free = np.zeros(n), np.zeros(n, bool)
  tolerance = 1e-10 * np.abs(a.T @ b).max()
  for _ in range(10 * n):  # far more than it takes
    gradient = a.T @ (b - a @ x)
    gain = np.where(free, -np.inf, gradient)
    if free.all() or gain.max() <= tolerance:
      break
    free[gain.argmax()] = True
    while True:
      wanted = np.zeros(n)
      wanted[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
      if (wanted[free] > 0).all():
        break
      falls = free & (wanted <= 0)  # as far towards `wanted` as all stay at least 0
      x += (x[falls] / (x[falls] - wanted[falls])).min() * (wanted - x)
      free &= x > 1e-15
      x[~free] = 0
    x = wanted
  return x
