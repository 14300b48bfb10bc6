"""Which blocks of a decode step are in slots still: a model of a request's selections by two numbers.

A selection comes back. Of the blocks that a step selects, a share was in none of the w steps before; measured on traces
of selections it falls as a power of w: `first * w ** -decay`. All that w successive steps select, their working set,
follows, since each step adds what was in none before it (Denning, The working set model for program behavior, 1968):

  W(w) = 1 + sum over v = 1 to w - 1 of first * v ** -decay, in selections of one step.

Slots are one LRU over all requests, layers and heads. It holds what the batch selected in its last w steps, for the
largest w whose working sets fit, so a row misses the share of its selection that is older. If not even one step of
the batch fits, hits shrink with the slots.

What the model leaves out: layers and heads are alike, a selection does not depend on the text, and rows that pause
neither keep slots nor find their blocks gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sparse_serve_jax.config import EngineConfig, check_fields
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.plan import DecodeRow, PrefillWork

_LONGEST = 1 << 16  # steps: w of the largest window that is told from one without end


@dataclasses.dataclass(frozen=True)
class Reuse:
  """How selections of successive steps overlap, on average over layers and heads."""

  SECTION = "reuse"

  first: float  # share of a selection that the step before it does not have
  decay: float  # power by which that share falls with the number of steps before
  density: float  # selected / full blocks where this was measured
  psa_blocks: float = 0.0  # of a layer and head that a step with sparse.policy=psa reads; 0: not known

  def __post_init__(self):
    check_fields(self, not_negative=("decay", "psa_blocks"))
    for key in ("first", "density"):
      if not 0 < getattr(self, key) < 1:
        raise ValueError(f"reuse.{key}={getattr(self, key)} is not in (0, 1)")


def fit_reuse(overlap: Sequence[float], density: float) -> Reuse:
  """From the shares [w] of a selection that are in the 1 to w steps before, which must all be below 1."""
  left = 1 - np.asarray(overlap, np.float64)
  if len(left) < 2 or not ((left > 0) & (left < 1)).all():
    raise ValueError(f"two shares or more, all between 0 and 1, make a curve; got {list(overlap)}")
  slope, start = np.polyfit(np.log(np.arange(1, len(left) + 1)), np.log(left), 1)
  return Reuse(min(float(np.exp(start)), 0.999), max(0.0, -float(slope)), density)


class Blocks:
  """Blocks of steps over all layers and heads, by a `Reuse`."""

  def __init__(self, config: EngineConfig, shape: CacheShape, reuse: Reuse):
    if config.sparse.policy == "psa" and not reuse.psa_blocks:
      raise ValueError(f"sparse.policy=psa: how many blocks a step reads is not known, psa_blocks={reuse.psa_blocks}")
    self._shape, self._reuse, self._window = shape, reuse, config.scheduler.working_set_steps
    self._dense_layers = min(config.sparse.dense_layers, shape.L)
    limits = {"dense": np.inf, "topk": config.budget_blocks, "psa": reuse.psa_blocks}
    self._limit = limits[config.sparse.policy]
    # Blocks of the end of a piece that enter slots: of a chunked prompt all that there is room for.
    chunked = config.scheduler.prefill == "chunked"
    self.newest = shape.P // (shape.K * shape.L) if chunked else config.budget_blocks
    steps = np.arange(1, _LONGEST + 1, dtype=np.float64)
    self._unseen = reuse.first * steps**-reuse.decay  # [w - 1], the share of a selection in none of w steps before
    self._working_set = 1 + np.concatenate([[0.0], np.cumsum(self._unseen)[:-1]])  # [w - 1], in selections

  def decode(self, rows: Sequence[DecodeRow]) -> tuple[int, int]:
    """Blocks that a step of these rows attends to, and how many of them are in no slot."""
    full = np.array([row.position for row in rows], np.float64) // self._shape.S
    of_layer = self._selected(full)
    cells = self._shape.L * self._shape.K
    blocks = cells * float(of_layer.sum())
    attended = round(blocks)
    if not self._shape.P or not attended:
      return attended, 0
    missing = self._missing(full, np.array([row.step for row in rows]), of_layer, blocks)
    return attended, min(attended, round(cells * float(of_layer @ missing)))

  def working_set(self, row: DecodeRow) -> int:
    """Blocks that a row selected in its last steps, as many as `scheduler.working_set_steps`."""
    full = np.array([row.position // self._shape.S], np.float64)
    of_layer = self._selected(full)
    steps = np.array([max(1, min(row.step, self._window))])
    union = self._union(full, of_layer, self._scale(full, of_layer), steps)
    return round(self._shape.L * self._shape.K * float(union[0]))

  def before_piece(self, work: PrefillWork, piece_tokens: int) -> int:
    """Blocks before a piece of a prompt that are in no slot. The newest of every piece of `piece_tokens` once were."""
    shape, prefix = self._shape, work.start // self._shape.S
    if not shape.P or not prefix:
      return 0
    pieces = -(-work.start // piece_tokens)
    kept = min(prefix, pieces * min(self.newest, piece_tokens // shape.S), shape.P // (shape.K * shape.L))
    return (prefix - kept) * shape.K * work.n_layers

  # Of rows, float64 [B]: `full` blocks, and `of_layer`, how many of these a layer and head selects on average.

  def _selected(self, full: np.ndarray) -> np.ndarray:
    """`of_layer`."""
    sparse = np.minimum(full, self._limit)
    return sparse + (full - sparse) * (self._dense_layers / self._shape.L) if self._dense_layers else sparse

  def _scale(self, full: np.ndarray, of_layer: np.ndarray) -> np.ndarray:
    """What is left of the turnover that was measured, for rows that select a larger share of their blocks: none if all
    are selected."""
    return np.minimum(1, (1 - of_layer / np.maximum(full, 1)) * (1 / (1 - self._reuse.density)))

  def _union(self, full: np.ndarray, of_layer: np.ndarray, scale: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Blocks of a layer and head that the last `steps`, 1 or more, select together."""
    return np.minimum(of_layer * (1 + scale * (self._working_set[steps - 1] - 1)), full)

  def _missing(self, full: np.ndarray, steps: np.ndarray, of_layer: np.ndarray, of_batch: float) -> np.ndarray:
    """Share of each row's selection that is in no slot. `of_batch`: blocks that one step of the batch selects."""
    room = self._shape.P / of_batch  # selections of the batch
    scale = self._scale(full, of_layer)
    turnover = float(scale @ of_layer / of_layer.sum())
    window = _LONGEST if room >= 1 else 1  # steps back that slots reach
    if 1 <= room < 1 + turnover * (self._working_set[-1] - 1):
      window = int(self._working_set.searchsorted(1 + (room - 1) / turnover, side="right"))
    known = np.minimum(np.maximum(steps, 1), window)  # of these, steps that there were
    missing = self._unseen[known - 1] * scale
    missing[self._union(full, of_layer, scale, known) >= full] = 0  # all blocks are there
    # Before a request's first step only the end of its prompt is there.
    missing = np.where(steps > 0, missing, 1 - np.minimum(1, self.newest / np.maximum(full, 1)))
    return missing if room >= 1 else 1 - (1 - missing) * room
