"""How often PSA keeps its promise, found while serving; and a threshold that moves until it does.

A stop of a progressive list promises that every query head of its KV head has read a share of the attention mass, by an
estimate. An audit reads the whole list of one row in one layer beside a step, which tells each query head's true share
exactly (`attention/audit.py`). Tokens are the same with and without; audits cost blocks, of which they get a share.

  python -m experiments.serve --config=psa --set sparse.audit=0.01 ...              # is 0.95 what it says?
  python -m experiments.serve --config=psa --set sparse.threshold=auto:0.95 ...     # make it so
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from sparse_serve_jax.config import SparseConfig
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.plan import Audited, AuditOf, DecodeRow, Observed, Plan

SEED = 0
ROUNDING = 1e-5  # of a share, which comes of float32
KEPT = 0.95  # of the audited stops, that are to keep the promise of a threshold that moves
STEP = 0.2  # of the threshold's log odds: a broken promise moves them up by KEPT of it, a kept one down by the rest
LEAST, MOST = 0.1, 1e6  # the range of its odds p / (1 - p): this part of the promise's, and these
Z = 1.959964  # standard deviations of a normal distribution that 95 % lie within


@dataclasses.dataclass(frozen=True)
class AuditSummary:
  """What the audits of a run came to; None where there is nothing to average.

  A stop counts if it left blocks unread. `audit_kept_low` and `audit_kept_high` are the 95 % interval of `wilson` for
  `audit_kept_share`. Stops of one audit are of one row and layer, and so not independent: it counts audits, not stops.
  """

  audits: int  # that found a stop which counts
  audited_stops: int
  audit_kept: int  # of these, that kept the promise
  audit_kept_share: float | None
  audit_kept_low: float | None
  audit_kept_high: float | None
  audit_true_share: float | None  # of the attention mass, the mean over query heads of the audited stops
  audit_promise: float
  audit_blocks: int  # read for audits
  psa_threshold: float  # now

  def to_dict(self) -> dict[str, int | float | None]:
    return dataclasses.asdict(self)


class Audits:
  """Decides what is audited, counts what is found, and moves the threshold if the configuration wants that.

  Which stops: a step may be audited when the audits so far and one of its longest row would stay within `audit_share`
  of the blocks attended to so far. Then a row and a layer are drawn, so that a row's length has no say in it. Layers
  that attend to everything are left out.

  The threshold (adaptive conformal inference, Gibbs and Candes, arXiv 2106.00193): each audited stop moves its log odds
  by STEP * (broken - (1 - KEPT)), broken being 1 or 0. Unless it comes to the end of its range, n stops break at most
  (1 - KEPT) n + log(MOST / odds of the promise) / STEP promises, with a promise of 0.95 in 5 % of them and 54 more,
  whatever comes: nothing is assumed of the model or the texts.
  """

  def __init__(self, sparse: SparseConfig, shape: CacheShape):
    """Audits of a configuration whose `audit_share` is positive."""
    self._sparse, self._shape = sparse, shape
    self._rng = np.random.default_rng(SEED)
    self._planned = 0  # blocks
    self._blocks = self._audits = self._stops = self._kept = 0
    self._shares = 0.0  # the sum over stops of the mean over their query heads
    self._log_odds = _log_odds(sparse.promise) if sparse.moves else 0.0

  @property
  def threshold(self) -> float:
    """What the next step stops by."""
    return 1 / (1 + math.exp(-self._log_odds)) if self._sparse.moves else self._sparse.promise

  def plan(self, plan: Plan, attended: int) -> Plan:
    """The plan with the threshold, and with an audit if it may have one.

    Args:
      plan: of the next iteration.
      attended: blocks that decode steps have attended to so far.
    """
    if not plan.decode:
      return plan
    plan = dataclasses.replace(plan, threshold=self.threshold)
    n_layers, dense = self._shape.L, self._sparse.dense_layers
    blocks = [self._cost(row) for row in plan.decode]
    may_cost = self._sparse.audit_share * attended - self._planned
    if dense == n_layers or not 0 < max(blocks) <= may_cost:
      return plan
    row, layer = int(self._rng.integers(len(blocks))), int(self._rng.integers(dense, n_layers))
    self._planned += blocks[row]
    return dataclasses.replace(plan, audit=AuditOf(row, layer))

  def take(self, plan: Plan, found: Audited) -> None:
    """Counts what the audit of a plan has found, KV head by KV head."""
    assert plan.audit is not None
    self._blocks += self._cost(plan.decode[plan.audit.row])
    counted = (found.unread > 0) & np.isfinite(found.share).all(-1)
    self._audits += bool(counted.any())
    for share in found.share[counted].astype(float):
      least = share.mean() if self._sparse.stop_when == "mean_of_heads" else share.min()
      kept = bool(least >= self._sparse.promise - ROUNDING)
      self._stops, self._kept, self._shares = self._stops + 1, self._kept + kept, self._shares + float(share.mean())
      if self._sparse.moves:
        self._move(broken=not kept)

  def _cost(self, row: DecodeRow) -> int:
    """Blocks of an audit of the row."""
    return row.position // self._shape.S * self._shape.K

  def _move(self, broken: bool) -> None:
    promise = _log_odds(self._sparse.promise)
    low, high = promise + math.log(LEAST), max(promise, math.log(MOST))
    self._log_odds = min(max(self._log_odds + STEP * (broken - (1 - KEPT)), low), high)

  def summary(self) -> AuditSummary:
    share = self._kept / self._stops if self._stops else None
    low, high = (None, None) if share is None else wilson(share, self._audits)
    return AuditSummary(
      audits=self._audits,
      audited_stops=self._stops,
      audit_kept=self._kept,
      audit_kept_share=share,
      audit_kept_low=low,
      audit_kept_high=high,
      audit_true_share=self._shares / self._stops if self._stops else None,
      audit_promise=self._sparse.promise,
      audit_blocks=self._blocks,
      psa_threshold=self.threshold,
    )


def row_of(seen: Observed) -> dict[str, Any] | None:
  """What an iteration's audit has found, as JSON values; None if there was none. Lists are of KV heads."""
  of, found = seen.plan.audit, seen.result.audit
  if of is None or found is None:
    return None
  row = seen.plan.decode[of.row]
  return {
    "iteration": seen.plan.iteration,
    "request_id": row.request_id,
    "position": row.position,
    "layer": of.layer,
    "threshold": seen.plan.threshold,
    "unread_blocks": found.unread.tolist(),
    "true_share": [[round(float(x), 6) if np.isfinite(x) else None for x in share] for share in found.share],
  }


def wilson(share: float, n: int) -> tuple[float, float]:
  """95 % score interval of a probability of which n > 0 trials have shown `share` (Wilson 1927)."""
  middle, spread = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
  return max(0.0, (middle - spread) / (1 + Z * Z / n)), min(1.0, (middle + spread) / (1 + Z * Z / n))


def _log_odds(p: float) -> float:
  return math.log(p / (1 - p))
