"""How accuracy depends on what is attended to: settings, and what replayed decode steps of generated tasks tell.

Instances are answered with dense attention up to their question; question and answer are decode steps with sparse
attention (`replay`). An instance is right if every token of its answer is the most likely one: what greedy decoding
would give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sparse_serve_jax.config import EngineConfig, override
from sparse_serve_jax.evaluation import methods, replay, tasks
from sparse_serve_jax.models import Model

BLOCK_TOKENS = (32, 16, 64)  # the first is that of all other comparisons
STEP_BUCKETS = (96, 192)  # steps are padded to one of these, or to the most there may be

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """One setting; `family` is a line of a plot, `at` a point of it."""

  family: str
  at: float
  config: EngineConfig
  oracle: bool = False

  @property
  def name(self) -> str:
    return f"{self.family} {self.at:g}"


def cases(names: Sequence[str], budgets: Sequence[int], thresholds: Sequence[float]) -> Iterator[Case]:
  """Dense; every method at every budget; the axes with the default method; PSA at every threshold."""

  def case(family: str, at: float, *changes: str, oracle: bool = False, block_tokens: int = BLOCK_TOKENS[0]) -> Case:
    small = f"sparse.sink_tokens={block_tokens}", f"sparse.window_tokens={block_tokens}"
    base = [f"cache.block_tokens={block_tokens}", *small, "sparse.policy=topk"]
    return Case(family, at, override(EngineConfig(), [*base, *changes]), oracle)

  yield case("dense", 1, "sparse.policy=dense")
  for budget in budgets:
    of = f"sparse.token_budget={budget}"
    for name in names:
      if name == "window":
        rest = max(0, budget - BLOCK_TOKENS[0])
        yield case("sinks and window", budget, of, f"sparse.window_tokens={rest}")
      elif name != "top_p":
        method = "cuboid_mean" if name == "oracle" else name
        yield case(name, budget, of, f"sparse.method={method}", oracle=name == "oracle")
    yield case("no sinks, no window", budget, of, "sparse.sink_tokens=0", "sparse.window_tokens=0")
    yield case("two layers dense", budget, of, "sparse.dense_layers=2")
    yield case("best query head", budget, of, "sparse.group_reduce=max")
    for size in BLOCK_TOKENS[1:]:
      yield case(f"blocks of {size}", budget, of, block_tokens=size)
  if "top_p" in names:
    yield case("top_p", methods.TOP_P, f"sparse.token_budget={1 << 20}", "sparse.method=top_p")
  for threshold in thresholds:
    yield case("psa", threshold, "sparse.policy=psa", f"sparse.threshold={threshold}")


@dataclasses.dataclass(frozen=True)
class Instances:
  """Instances of one task, padded to one length."""

  tokens: np.ndarray  # [B, T] int32
  start: np.ndarray  # [B] int32, the first decode step: where the question begins
  answers: np.ndarray  # [B, n] bool, the steps that predict a token of the answer

  @classmethod
  def of(cls, model: Model, task: str, n_tokens: int, seeds: range, most_steps: int) -> Instances:
    width = -(-n_tokens // max(BLOCK_TOKENS)) * max(BLOCK_TOKENS)
    tokens, start, end = np.zeros((len(seeds), width), np.int32), [], []
    first_answer = []
    for row, seed in zip(tokens, seeds, strict=True):
      instance = tasks.make(task, n_tokens, seed, model.tokenizer, split="eval")
      ids, n_prompt = instance.encode(model.tokenizer)
      row[: len(ids)] = ids
      context = instance.prompt.rindex("\nQuestion:")
      start.append(len(model.tokenizer.encode(instance.prompt[:context])))
      first_answer.append(n_prompt)
      end.append(len(ids))
    needed = max(b - a for a, b in zip(start, end, strict=True)) - 1
    n = min(most_steps, next((size for size in STEP_BUCKETS if size >= needed), most_steps))
    predicted = np.array(start)[:, None] + np.arange(n)[None] + 1
    answers = (predicted >= np.array(first_answer)[:, None]) & (predicted < np.array(end)[:, None])
    if not answers.any(1).all():
      raise ValueError(f"{most_steps} decode steps end before the answer to a question of {task!r} begins")
    return cls(tokens, np.array(start, np.int32), answers)


def measure(
  model: Model,
  params: Any,
  task: str,
  n_tokens: int,
  wanted: Sequence[Case],
  n_instances: int,
  at_once: int,
  steps: int,
) -> Iterator[tuple[Case, Row]]:
  """Yields, for each case, the means over instances of a task at a length, and which of the instances were right.

  Args:
    model: the model.
    params: its parameters on the device.
    task: a name in `tasks.TASKS`.
    n_tokens: of prompt and answer.
    wanted: the settings.
    n_instances: of the evaluation split, from its first on.
    at_once: instances of a batch.
    steps: decode steps at most; a longer answer is judged by its beginning.
  """
  parts: dict[str, list[dict[str, np.ndarray]]] = {case.name: [] for case in wanted}
  for first in tqdm(range(0, n_instances, at_once), desc=f"{task} {n_tokens}", leave=False, disable=None):
    seeds = range(first, min(first + at_once, n_instances))
    batch = Instances.of(model, task, n_tokens, seeds, steps)
    dense = replay.prefill(model.config, params, batch.tokens)
    for case in wanted:
      program, setting = replay.Program.of(case.config, oracle=case.oracle), replay.Setting.of(case.config)
      found = replay.replay(
        model.config, program, params, setting, dense, batch.tokens, batch.start, batch.answers.shape[1]
      )
      found = jax.device_get(found._replace(selected=None))  # by far the largest
      parts[case.name].append(summary(model, case, batch, found))
  for case in wanted:
    whole = {key: np.concatenate([part[key] for part in parts[case.name]]) for key in parts[case.name][0]}
    row = {key: float(values.mean()) for key, values in whole.items()}
    yield case, row | {"right_each": whole["accuracy"].astype(int).tolist()}


def summary(model: Model, case: Case, batch: Instances, found: Any) -> dict[str, np.ndarray]:
  """One number an instance of each quantity, over its answer's steps, layers and heads."""
  cfg, size = model.config, case.config.cache.block_tokens
  answers = batch.answers
  mean = lambda x: (x * answers).sum(1) / answers.sum(1)  # noqa: E731  x [B, n]
  attended = found.blocks.mean((2, 3))  # [B, n]
  exist = (batch.start[:, None] + np.arange(answers.shape[1])[None]) // size
  block, digest = 2 * size * cfg.head_dim, methods.METHODS[case.config.sparse.method].vectors * cfg.head_dim
  digest = 0 if case.family in ("dense", "sinks and window") else digest  # which need none
  over = found.estimate - found.mass
  return {
    "accuracy": (found.right | ~answers).all(1),
    "nats": mean(found.nats),
    "blocks": mean(attended),
    "bytes": mean((attended * block + exist * digest) / (exist * block)),
    "mass": mean(found.mass.mean((2, 3, 4))),
    "estimate_over": mean((over > 1e-3).mean((2, 3, 4))),
    "estimate_error": mean(over.mean((2, 3, 4))),
  }


def interval(right: list[int], dense: list[int], seed: int = 0) -> tuple[float, float]:
  """95 % interval of the difference in accuracy from dense, by the paired bootstrap over instances."""
  difference = np.array(right, float) - np.array(dense, float)
  drawn = np.random.default_rng(seed).integers(0, len(difference), (10_000, len(difference)))
  low, high = np.quantile(difference[drawn].mean(1), (0.025, 0.975))
  return float(low), float(high)


def table(rows: list[Row]) -> str:
  """Markdown: the mean over tasks of each group, by setting."""
  lines = []
  for n_tokens in sorted({row["tokens"] for row in rows}):
    for group in sorted({row["group"] for row in rows}):
      chosen = [row for row in rows if row["tokens"] == n_tokens and row["group"] == group]
      if not chosen:
        continue
      lines += [f"\n{group}, {n_tokens} tokens, mean of {len({row['task'] for row in chosen})} tasks\n"]
      lines += [
        "| setting | accuracy | blocks | bytes of dense | mass | estimate above mass |",
        "|---|--:|--:|--:|--:|--:|",
      ]
      for case in dict.fromkeys(row["case"] for row in chosen):
        of = lambda key: np.mean([row[key] for row in chosen if row["case"] == case])  # noqa: B023, E731
        psa = f"{of('estimate_over'):.1%}" if case.startswith("psa") else ""
        lines += [
          f"| {case} | {of('accuracy'):.1%} | {of('blocks'):.1f} | {of('bytes'):.1%} | {of('mass'):.3f} | {psa} |"
        ]
  return "\n".join(lines) + "\n"
