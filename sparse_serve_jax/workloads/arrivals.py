"""When requests arrive: processes by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np

from sparse_serve_jax.variants import variant
from sparse_serve_jax.workloads.config import ArrivalConfig


def all_at_once(n: int, rate: float, seed: int) -> np.ndarray:
  if rate:
    raise ValueError(f"requests that arrive all at once have no rate of arrivals, got {rate}; poisson has")
  return np.zeros(n)


def poisson(n: int, rate: float, seed: int) -> np.ndarray:
  """A Poisson process: gaps are exponential with mean 1 / rate, and not clipped."""
  return np.cumsum(np.random.default_rng(seed).exponential(1 / checked_rate(rate), n))


# (n, rate a second, seed, options of its own by name) -> seconds after the start, float64 [n] ascending.
ARRIVALS: dict[str, Callable[..., np.ndarray]] = {"all_at_once": all_at_once, "poisson": poisson}


def checked_rate(rate: float) -> float:
  """`rate`, if requests can arrive at it; otherwise ValueError."""
  if not 0 < rate < math.inf:
    raise ValueError(f"the rate of arrivals must be above 0 and finite, in requests a second, got {rate}")
  return rate


def arrival_times(config: ArrivalConfig, n: int) -> np.ndarray:
  """When n requests arrive, in seconds after the start, float64 [n] ascending.

  Raises:
    ValueError: no such process, or a rate or options that it does not take.
  """
  process = variant(ARRIVALS, config.process, "arrivals.process")
  try:
    inspect.signature(process).bind(n, config.rate, config.seed, **config.options)
  except TypeError as error:
    raise ValueError(f"the options of the arrival process {config.process!r}: {error}") from None
  times = process(n, config.rate, config.seed, **config.options)
  if times.shape != (n,) or not (np.diff(times, prepend=0) >= 0).all():
    raise ValueError(f"{config.process!r} is to give {n} ascending times, it gave {times!r:.80} of shape {times.shape}")
  return times
