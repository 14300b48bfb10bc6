"""Which blocks successive decode steps select: traces of them, and how much of a selection comes back.

Two curves over a number of steps w say what a cache of blocks can gain (SparseServe, arXiv 2509.24626, section 3.3):
the overlap of a step's selection with those of the w steps before, and the working set, all that w steps select.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_serve_jax.attention.drawn import Drawn, Where, held
from sparse_serve_jax.attention.traces import Trace
from sparse_serve_jax.evaluation import accuracy
from sparse_serve_jax.evaluation.accuracy import Case, Row, Sample
from sparse_serve_jax.models import Model
from sparse_serve_jax.simulation.reuse import Reuse, fit_reuse

MOST = 32  # w of the curves is 1 to this
QUESTION = 96  # decode steps at most before the answer's
FILLED = 64  # steps before misses are counted: slots have filled
SLOTS = (1.1, 1.25, 1.5, 2.0, 3.0, 6.0)  # of a cache, in what one step selects
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2)  # A of held:A that are tried
LEAST_MISS = 1e-4  # a fit makes no difference between shares below it


def measure(model: Model, params: Any, sample: Sample, wanted: Sequence[Case]) -> Iterator[tuple[Case, Trace]]:
  """Yields what each case selects while the answers of a sample are decoded; its `steps`, n, are those of an answer.

  They are fewer where the shortest answer has fewer. Other arguments as those of `accuracy.measure`.

  Raises:
    ValueError: the shortest answer has no more steps than working sets are made of.
  """
  parts: dict[str, list[np.ndarray]] = {case.name: [] for case in wanted}
  lengths: list[np.ndarray] = []
  with_question = sample._replace(steps=QUESTION + sample.steps)
  for batch, case, found in accuracy.replays(model, params, with_question, wanted):
    selected = jax.device_get(found.selected)
    n = min(sample.steps, int(batch.answers.sum(1).min()))
    first = batch.answers.argmax(1)
    parts[case.name] += [of[i : i + n] for of, i in zip(selected, first, strict=True)]
    if case is wanted[0]:
      lengths.append(batch.start + first)
  n = min(len(of) for of in parts[wanted[0].name])
  if n <= MOST:
    of = f"an answer of {sample.task} at {sample.tokens} tokens"
    raise ValueError(f"{n} steps of {of} are too few: curves need more than {MOST}")
  for case in wanted:
    selected = np.stack([of[:n] for of in parts[case.name]])
    before = np.concatenate(lengths).astype(np.int32)
    conf = case.config
    yield case, Trace(selected, before, conf.cache.block_tokens, case.name, model.name, sample.task, conf.sparse.policy)


def reuse(trace: Trace) -> Row:
  """How much of a selection comes back.

  Returns:
    By layer and KV head, over the steps that have MOST steps before them: "blocks" [L, K], the mean of |S_t|; and with
    w = 1 to MOST last "overlap" [L, K, MOST], the sum of |S_t and (S_t-1 or ... S_t-w)| by that of |S_t|, and
    "working_set" [L, K, MOST], the sum of |S_t or ... S_t-w+1| by that of |S_t|.
  """
  n_requests, n, n_layers, n_heads, _ = trace.selected.shape
  shape = n_layers, n_heads, MOST + 1
  cell = np.arange(n_layers * n_heads).reshape(n_layers, n_heads, 1) * (MOST + 1)

  def by_age(age: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Counts [L, K, MOST + 1] of the blocks `which` [R, L, K, N] by age, the last of MOST and more."""
    return np.bincount((np.minimum(age, MOST) + cell)[which], minlength=cell.size * (MOST + 1)).reshape(shape)

  overlap, union = np.zeros((2, *shape), int)
  last = np.full(trace.selected[:, 0].shape, -MOST - 1)  # the step that selected a block last
  for t in range(n):
    now, before = trace.selected[:, t], t - 1 - last
    last[now] = t
    if t >= MOST:
      overlap += by_age(before, now)
      union += by_age(t - last, np.ones_like(now))
  total = overlap.sum(-1)  # [L, K]
  curves = {"overlap": overlap, "working_set": union}
  told = {key: (of[..., :MOST].cumsum(-1) / total[..., None]).round(4).tolist() for key, of in curves.items()}
  return {"blocks": (total / ((n - MOST) * n_requests)).round(3).tolist()} | told


def curve(told: Row, key: str) -> np.ndarray:
  """Of what `reuse` tells the "overlap" or the "working_set" [MOST], of all layers and heads: each by its blocks."""
  blocks = np.array(told["blocks"])  # [L, K]
  return (np.array(told[key]) * blocks[..., None]).sum((0, 1)) / blocks.sum()


def mean_reuse(traces: Sequence[Trace]) -> Reuse:
  """What a simulation knows of selections, by traces that all count alike."""
  if not traces:
    raise ValueError("how blocks come back is found in a trace of selections or more, got none")
  curves, densities = [], []
  for trace in traces:
    told = reuse(trace)
    curves.append(curve(told, "overlap"))
    densities.append(
      np.mean(told["blocks"]) / (trace.lengths + trace.selected.shape[1] / 2).mean() * trace.block_tokens
    )
  return fit_reuse(np.mean(curves, 0).tolist(), float(np.mean(densities)))


def in_short(trace: Trace) -> Row:
  """Numbers over all layers, heads and requests.

  Returns:
    "blocks", what a step, layer and head selects, of "full" ones; "overlap" with the step before; "union_12", what 12
    steps select, in selections of one; "misses" of exact LRU by slots in SLOTS, as shares from step FILLED on.
  """
  told = reuse(trace)
  return {
    "blocks": round(float(np.mean(told["blocks"])), 2),
    "full": int(trace.lengths.mean()) // trace.block_tokens,
    "overlap": round(float(curve(told, "overlap")[0]), 4),
    "union_12": round(float(curve(told, "working_set")[11]), 3),
    "misses": {f"{slots:g}": round(misses(trace, slots), 5) for slots in SLOTS},
  }


def misses(trace: Trace, slots: float) -> float:
  """Of the blocks that are selected from step FILLED on, the share that exact LRU does not hold.

  One LRU over all requests, layers and heads, in the order of layers; `slots` in what a step selects on average.

  Raises:
    ValueError: the trace is not longer than FILLED steps.
  """
  by_step = trace.selected.transpose(1, 2, 0, 3, 4)
  n = len(by_step)
  if n <= FILLED:
    raise ValueError(f"misses are counted from step {FILLED} on, and the trace has {n}")
  room, used, missed, total = round(slots * trace.selected.sum() / n), {}, 0, 0
  for t, step in enumerate(by_step):
    blocks = np.flatnonzero(step).tolist()
    for block in blocks:
      if block in used:
        del used[block]
      else:
        missed += t >= FILLED
        if len(used) >= room:
          del used[next(iter(used))]
      used[block] = None
    total += len(blocks) if t >= FILLED else 0
  return missed / total


def drawn_like(name: str, drawn: Drawn, like: Trace) -> Trace:
  """Drawn selections of as many blocks as the recorded trace `like` has; one of them is a sink and one the window.

  Args:
    name: of the trace's case.
    drawn: scores.
    like: the trace that says how many.
  """
  _, n, n_layers, n_heads, width = like.selected.shape
  count = round(float(like.selected.sum(-1).mean()))
  start, block = jnp.asarray(like.lengths, jnp.int32), jnp.arange(width)[None, None]

  @jax.jit
  def step(t):
    full = ((start + t) // like.block_tokens)[:, None, None]

    def of_layer(layer):
      at = Where(layer, jnp.arange(n_heads), start, start + t, like.block_tokens, width)
      forced = (block < 1) | (block >= full - 1)
      scores = jnp.where(block < full, jnp.where(forced, jnp.inf, drawn(at)), -jnp.inf)
      return (scores >= jax.lax.top_k(scores, count)[0][..., -1:]) & (block < full)  # [R, K, N]

    return jax.lax.map(of_layer, jnp.arange(n_layers))

  selected = np.stack([np.asarray(step(jnp.int32(t))) for t in range(n)], 1)  # [L, n, R, K, N]
  return Trace(selected.transpose(2, 1, 0, 3, 4), like.lengths, like.block_tokens, name, "drawn", like.task)


def fit(trace: Trace, steps: int = 128) -> dict[str, float]:
  """The A with which selections of held:A come back as those of a trace do, over its first `steps`.

  Returns:
    "by_overlap": the A of the same overlap with the step before; "by_misses": the one of SHARES whose logarithms of
    misses are nearest.
  """
  first = dataclasses.replace(trace, selected=trace.selected[:, :steps])
  told, found = in_short(first), [in_short(drawn_like(f"held:{share}", held(share), first)) for share in SHARES]

  def logs(row: Row) -> np.ndarray:
    return np.log(np.maximum(list(row["misses"].values()), LEAST_MISS))

  off = [float(((logs(row) - logs(told)) ** 2).sum()) for row in found]
  overlaps = [row["overlap"] for row in found]  # falling
  by_overlap = float(np.interp(-told["overlap"], [-x for x in overlaps], SHARES))
  return {"by_overlap": round(by_overlap, 3), "by_misses": SHARES[int(np.argmin(off))]}
