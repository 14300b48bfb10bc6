"""How sure a difference from other answers to the same instances is: the paired bootstrap over instances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

N_DRAWS = 10_000


def bootstrap(values: Sequence[Sequence[float]], dense: Sequence[Sequence[float]], level: float = 1.0) -> np.ndarray:
  """Means of values - level dense in 10,000 draws of the paired bootstrap, [10000]; the draws are always the same.

  Args:
    values: of each task, of each instance. Instances are drawn within their task, and the tasks weigh the same.
    dense: the same instances'.
    level: what of dense they are compared with.
  """
  rng, drawn = np.random.default_rng(0), np.zeros(N_DRAWS)
  for ours, theirs in zip(values, dense, strict=True):
    difference = np.array(ours, float) - level * np.array(theirs, float)
    for part in np.array_split(drawn, 10):  # views
      part += difference[rng.integers(0, len(difference), (len(part), len(difference)))].mean(1) / len(values)
  return drawn


def interval(values: Sequence[Sequence[float]], dense: Sequence[Sequence[float]]) -> tuple[float, float]:
  """95 % interval of the mean difference from dense; (0, 0) where no instance differs."""
  low, high = np.quantile(bootstrap(values, dense), (0.025, 0.975))
  return float(low), float(high)


def of_ratio(values: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float]:
  """95 % interval of the mean of values by the mean of others, which are positive, of the same instances."""
  low, high = np.quantile(means(values) / means(others), (0.025, 0.975))
  return float(low), float(high)


def means(values: Sequence[Sequence[float]]) -> np.ndarray:
  """Means of values in the draws, [10000]; of values of equal shape the same instances are drawn."""
  return bootstrap(values, [[0.0] * len(of) for of in values])
