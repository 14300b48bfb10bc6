"""Rates that are found by trying: goodput, and where requests begin to wait."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from sparse_serve_jax.ladder.folder import Row
from sparse_serve_jax.serving import metrics

CLOSE = 1.1  # the search ends where the rates around it are within this factor


@dataclasses.dataclass(frozen=True)
class Goodput:
  """The highest rate at which a rung serves well: `metrics.keeps_slo`."""

  rate: float | None  # requests a second, measured; None: not even the lowest rate that was tried
  fails_at: float | None  # the lowest rate above it that was tried; None: the highest that was tried serves well too


def search(serves_well: Callable[[float], bool], rates: Sequence[float], most_runs: int) -> Goodput:
  """The highest rate that serves well below the first that does not; see `Ladder.goodput`."""
  good: float | None = None
  bad: float | None = None
  for rate in sorted(rates):
    if not serves_well(rate):
      bad = rate
      break
    good = rate
  while good is not None and bad is not None and bad / good > CLOSE and most_runs:
    middle, most_runs = math.sqrt(good * bad), most_runs - 1
    good, bad = (middle, bad) if serves_well(middle) else (good, middle)
  return Goodput(good, bad)


def passing(delay: Callable[[float], float], rates: Sequence[float], most_runs: int) -> float:
  """The rate at which the mean delay passes what goodput allows; see `Ladder.overload`."""
  found = search(lambda rate: delay(rate) <= metrics.MOST_DELAY_S, [rate for rate in rates if rate], most_runs)
  if found.rate is None or found.fails_at is None:
    all_or_none = "none" if found.rate is None else "all"
    told = ", ".join(f"{rate:g}" for rate in sorted(rates) if rate)
    raise ValueError(
      f"the mean delay is below {metrics.MOST_DELAY_S:g} s at {all_or_none} of the rates {told}: add one"
    )
  low, high = delay(found.rate), delay(found.fails_at)
  share = (metrics.MOST_DELAY_S - low) / (high - low) if math.isfinite(high) else 0
  return float(f"{found.rate * (found.fails_at / found.rate) ** share:.3g}")


def goodputs(cells: Sequence[Row]) -> dict[str, Goodput]:
  """Of each rung, by the cells that there are with a rate."""
  found = {}
  for rung in dict.fromkeys(cell["rung"] for cell in cells if cell["rate"]):
    serves_well = {cell["rate"]: cell["keeps_slo"] for cell in cells if cell["rung"] == rung and cell["rate"]}
    found[rung] = search(serves_well.__getitem__, list(serves_well), most_runs=0)
  return found
