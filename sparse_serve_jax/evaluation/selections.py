"""Which blocks successive decode steps select: traces of them, and how much of a selection comes back.

What a cache of blocks can win is said by two curves over a number of steps w (SparseServe, arXiv 2509.24626, section
3.3): the overlap of a step's selection with those of the w steps before, and the working set, all that w steps select.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sparse_serve_jax.attention.traces import Trace
from sparse_serve_jax.evaluation import accuracy
from sparse_serve_jax.evaluation.accuracy import Case, Row, Sample
from sparse_serve_jax.models import Model

MOST = 32  # w of the curves is 1 to this
QUESTION = 96  # decode steps at most before the answer's


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
    yield case, Trace(selected, before, case.config.cache.block_tokens, case.name, model.name, sample.task)


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
