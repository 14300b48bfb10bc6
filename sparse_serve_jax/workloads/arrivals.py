"""When requests arrive: processes by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np

from sparse_serve_jax.variants import variant
from sparse_serve_jax.workloads.config import ArrivalConfig
from sparse_serve_jax.workloads.traces import read_trace, rescaled


def all_at_once(n: int, rate: float, seed: int) -> np.ndarray:
  """Zeros for all `n`; `seed` is not read.

  Raises:
    ValueError: `rate` is not 0.
  """
  if rate:
    raise ValueError(f"requests that arrive all at once have no rate of arrivals, got {rate}; poisson has")
  return np.zeros(n)


def poisson(n: int, rate: float, seed: int) -> np.ndarray:
  """A Poisson process of `n` requests: gaps are exponential with mean 1 / rate seconds, and not clipped.

  The times of one `seed` differ between rates by a factor only.
  """
  return np.cumsum(np.random.default_rng(seed).exponential(1 / checked_rate(rate), n))


def gamma(n: int, rate: float, seed: int, *, cv: float = 1.0) -> np.ndarray:
  """Gaps are gamma-distributed with mean 1 / rate, and not clipped: bursts. `n`, `rate` and `seed` are as of `poisson`.

  Args:
    cv: standard deviation of the gaps / their mean, 0.01 to 100. 1 is a Poisson process, more comes in bursts.

  Raises:
    ValueError: a `cv` or a rate beyond these.
  """
  if type(cv) not in (int, float) or not 0.01 <= cv <= 100:
    raise ValueError(f"cv, standard deviation / mean of the gaps, is a number from 0.01 to 100, got {cv!r}")
  return np.cumsum(np.random.default_rng(seed).gamma(1 / cv**2, cv**2 / checked_rate(rate), n))


def trace(n: int, rate: float, seed: int, *, path: str) -> np.ndarray:
  """The first `n` times of a trace, the file `path`. A `rate` that is not 0 becomes the mean rate of the whole trace.

  `seed` is not read.

  Raises:
    ValueError: the trace cannot be read, has fewer times, or none that a rate could change.
  """
  if not isinstance(path, str):
    raise ValueError(f"path is the file of a trace, got {path!r}")
  recorded = read_trace(path)
  if n > len(recorded):
    raise ValueError(f"{n} requests are to arrive as in {path}, which has {len(recorded)}")
  return (rescaled(recorded, checked_rate(rate)) if rate else recorded.times)[:n]


# (n, rate a second, seed, options of its own by name) -> seconds after the start, float64 [n] ascending.
ARRIVALS: dict[str, Callable[..., np.ndarray]] = {
  "all_at_once": all_at_once,
  "gamma": gamma,
  "poisson": poisson,
  "trace": trace,
}


def checked_rate(rate: float) -> float:
  """`rate`, if requests can arrive at it; otherwise ValueError."""
  if not 0 < rate < math.inf:
    raise ValueError(f"the rate of arrivals must be above 0 and finite, in requests a second, got {rate}")
  return rate


def arrival_times(config: ArrivalConfig, n: int) -> np.ndarray:
  """When requests arrive, in seconds after the start, float64 [n] ascending.

  Args:
    config: names the process, and has its rate, seed and options.
    n: requests.

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
