"""Settings against fixed budgets that read as many bytes: what a stop rule, or another ranking, gains over a budget.

Bytes are those of a step and layer: the keys and values that are attended to, and the digests that rank them. At the
mean bytes of a setting the error and the nats of every instance are interpolated, linearly in bytes, between the two
budgets of the default method next to it; so the comparison is paired. A setting that
reads less than the smallest budget, or more than the largest, is not compared.

The other way round, at the mean error or nats of a setting the blocks of a budget that has as much are interpolated: by
how much fewer the setting reads is PSA's first ratio (arXiv 2503.00392, abstract).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparse_serve_jax.evaluation import intervals
from sparse_serve_jax.evaluation.accuracy import Row, of_all_tasks
from sparse_serve_jax.evaluation.cases import DEFAULT_METHOD, DENSE

MEANS = ("blocks", "bytes_read", "bytes", "mass", "error", "nats", "agreement")


def compared(rows: Sequence[Row]) -> Iterator[Row]:
  """Of the rows of one length and group, an entry for each case that all of its tasks have.

  Yields:
    "case", "series", "at", means over tasks of MEANS, "nats_more", more than dense's; "short", the share of stopped
    pairs of a token and a query head that have less than the threshold, and "broken", that of stops of a KV head that
    break their promise, both None where nothing stops. Against the fixed budget at equal bytes: "fixed_error",
    "error_ratio" with "ratio_interval", and "nats_more_than_fixed" with "nats_interval", None where there is no such
    budget, or the case is one, or dense. "fewer_for_nats" and "fewer_for_error" are blocks of a fixed budget that has
    as much, by the case's, each with an "_interval"; None where no budget of those there are has as much, or the case
    reads no block. Intervals are 95 % ones of the paired bootstrap over instances.
  """
  cases = of_all_tasks(rows)
  fixed = sorted((ours for ours in cases if ours[0]["series"] == DEFAULT_METHOD), key=_bytes)
  dense = next((ours for ours in cases if ours[0]["series"] == DENSE), None)
  curves = {key: Curve.of(fixed, key) for key in ("nats", "error")} if len(fixed) > 1 else {}
  for ours in cases:
    told: Row = {key: ours[0][key] for key in ("case", "series", "at")}
    told |= {key: float(np.mean([row[key] for row in ours])) for key in MEANS}
    for key, of_all in (("short", "stopped"), ("broken", "stops")):
      n = sum(row.get(of_all, 0) for row in ours)
      told[key] = sum(row[key] for row in ours) / n if n else None
    told["nats_more"] = told["nats"] - float(np.mean([row["nats"] for row in dense])) if dense else None
    against = ours is not dense and ours not in fixed
    yield told | _against(ours, fixed if against else []) | _fewer(ours, curves if against else {})


def _against(ours: Sequence[Row], fixed: Sequence[Sequence[Row]]) -> Row:
  """The comparison of a case's rows with those of budgets, in the order of their bytes."""
  error, other = _each(ours, "error"), at_bytes(fixed, _bytes(ours), "error")
  nats, other_nats = _each(ours, "nats"), at_bytes(fixed, _bytes(ours), "nats")
  if other is None or other_nats is None or not np.mean(np.concatenate(other)) > 0:
    keys = "fixed_error", "error_ratio", "ratio_interval", "nats_more_than_fixed", "nats_interval"
    return dict.fromkeys(keys)
  fixed_error, of_nats = (float(np.mean([np.mean(task) for task in of])) for of in (other, other_nats))
  return {
    "fixed_error": fixed_error,
    "error_ratio": float(np.mean([np.mean(task) for task in error])) / fixed_error,
    "ratio_interval": intervals.of_ratio(error, other),
    "nats_more_than_fixed": float(np.mean([np.mean(task) for task in nats])) - of_nats,
    "nats_interval": intervals.interval(nats, other_nats),
  }


def _fewer(ours: Sequence[Row], curves: Mapping[str, Curve]) -> Row:
  """How many times the case's blocks a fixed budget needs, for its nats and for its error."""
  told: Row = {}
  blocks = float(np.mean([row["blocks"] for row in ours]))
  for key in ("nats", "error"):
    found = curves[key].blocks_for(_each(ours, key)) if key in curves and blocks else None
    told[f"fewer_for_{key}"] = None if found is None else found[0] / blocks
    told[f"fewer_for_{key}_interval"] = None if found is None else tuple(at / blocks for at in found[1])
  return told


class Curve(NamedTuple):
  """The values of fixed budgets under a key: they fall as budgets grow, and where one does not, the least before it
  counts.
  """

  blocks: np.ndarray  # [budgets], ascending
  mean: np.ndarray  # [budgets]
  drawn: np.ndarray  # [budgets, draws], means of the bootstrap's draws

  @classmethod
  def of(cls, fixed: Sequence[Sequence[Row]], key: str) -> Curve:
    """For each budget the rows of all tasks, in the order of their bytes."""
    each = [_each(ours, key) for ours in fixed]
    mean, drawn = [np.mean([np.mean(task) for task in of]) for of in each], [intervals.means(of) for of in each]
    blocks = np.array([np.mean([row["blocks"] for row in ours]) for ours in fixed])
    return cls(blocks, np.minimum.accumulate(mean), np.minimum.accumulate(drawn))

  def blocks_for(self, values: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float]] | None:
    """Blocks of a budget whose mean is that of `values`, of each task and instance; and a 95 % interval, in which draws
    beyond the budgets count as the outermost one. None if the mean lies beyond them.
    """
    mean = float(np.mean([np.mean(task) for task in values]))
    if not self.mean[-1] <= mean <= self.mean[0]:
      return None
    drawn = [self._at(of, value) for of, value in zip(self.drawn.T, intervals.means(values), strict=True)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return self._at(self.mean, mean), (float(low), float(high))

  def _at(self, means: np.ndarray, value: float) -> float:
    return float(np.interp(value, means[::-1], self.blocks[::-1]))


def at_bytes(fixed: Sequence[Sequence[Row]], read: float, key: str) -> list[list[float]] | None:
  """What every instance of every task has under `key` with a fixed budget that reads so many bytes, interpolated.

  Args:
    fixed: for each budget the rows of all tasks, in the order of their bytes.
    read: bytes of a step and layer.
    key: of `each` of rows.

  Returns:
    None if `read` lies outside the budgets' bytes.
  """
  sizes = [_bytes(ours) for ours in fixed]
  # Means of a few float64 numbers: the same blocks may differ in the last digits.
  slack = 1e-9 * read
  if not sizes or not sizes[0] - slack <= read <= sizes[-1] + slack:
    return None
  above = min(int(np.searchsorted(sizes, read - slack)), len(sizes) - 1)
  below = max(above - 1, 0)
  width = sizes[above] - sizes[below]
  share = min((read - sizes[below]) / width, 1.0) if width > 0 else 0.0
  pairs = zip(_each(fixed[below], key), _each(fixed[above], key), strict=True)
  return [((1 - share) * np.array(low) + share * np.array(high)).tolist() for low, high in pairs]


def _bytes(ours: Sequence[Row]) -> float:
  return float(np.mean([row["bytes_read"] for row in ours]))


def _each(ours: Sequence[Row], key: str) -> list[list[float]]:
  return [row["each"][key] for row in ours]


# Of the table in `report`.
TITLE = (
  f"At equal bytes: settings against {DEFAULT_METHOD} with a fixed budget\n"
  "KiB are those of a step and layer, digests included. Ratio: the error by that of a fixed budget of as many bytes, "
  "and the nats more than its; between budgets its values are interpolated for each instance. Fewer than fixed: "
  "blocks of a budget with the same nats, or the same error, by the setting's. Intervals are 95 % ones of the paired "
  "bootstrap over instances. Below threshold: of the pairs of a token and a query head that stopped, those with "
  "less true mass; broken stops: of those of a KV head, the ones with such a head, or whose mean is below if means "
  "are tested."
)
HEAD = (
  *("setting", "blocks", "KiB", "mass", "error", "of fixed", "ratio", "interval"),
  *("nats vs dense", "nats vs fixed", "interval", "fewer than fixed: nats", "error"),
  *("agreement", "below threshold", "broken stops"),
)


def cells(of: Row, _: list[Row]) -> Iterator[list[str]]:
  """The line of an entry."""
  line = [of["case"], f"{of['blocks']:.1f}", f"{of['bytes_read'] / 1024:.1f}"]
  line += [f"{of['mass']:.3f}", f"{of['error']:.4f}"]
  if of["error_ratio"] is None:
    ratio, nats = ["", "", ""], ["", ""]
  else:
    (low, high), (less, more) = of["ratio_interval"], of["nats_interval"]
    ratio = [f"{of['fixed_error']:.4f}", f"{of['error_ratio']:.3f}", f"{low:.3f} to {high:.3f}"]
    nats = [f"{of['nats_more_than_fixed']:+.4f}", f"{less:+.4f} to {more:+.4f}"]
  vs_dense = "" if of["nats_more"] is None else f"{of['nats_more']:+.4f}"
  fewer = []
  for key in ("fewer_for_nats", "fewer_for_error"):
    low, high = of[f"{key}_interval"] or (0.0, 0.0)
    fewer.append("" if of[key] is None else f"{of[key]:.2f} ({low:.2f} to {high:.2f})")
  promise = ["" if of[key] is None else f"{of[key]:.1%}" for key in ("short", "broken")]
  yield [*line, *ratio, vs_dense, *nats, *fewer, f"{of['agreement']:.1%}", *promise]
