"""What a model still answers when it attends to part of its context: selection methods by budget, PSA by threshold.

  python -m experiments.accuracy --model=DIR --out=/tmp/accuracy --lengths=16384 --tasks=single_text,multi_key

Instances of the generated tasks are answered with dense attention up to their question; question and answer are decode
steps with sparse attention, replayed for every setting over the same prefill (`sparse_serve_jax.evaluation.replay`). An
instance is right if every token of its answer is the most likely one: what greedy decoding would give.

The folder of --out gets results.jsonl, a row for each task, length and setting: accuracy with the 95 % interval of its
difference from dense (paired bootstrap), blocks attended, bytes read with digests as a share of dense, attention mass
attended, and how often PSA's estimate overstates it. What is there is not run again. Then tables (results.md) and, per
length, a plot of accuracy against bytes. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from sparse_serve_jax import runtime
from sparse_serve_jax.config import EngineConfig, override
from sparse_serve_jax.evaluation import methods, replay, tasks
from sparse_serve_jax.models import Model, load_model

_MODEL = flags.DEFINE_string("model", None, "A model directory.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of results.", required=True)
_TASKS = flags.DEFINE_list("tasks", ["all"], "Names of generated tasks; all.")
_LENGTHS = flags.DEFINE_list("lengths", ["16384"], "Tokens of prompt and answer.")
_INSTANCES = flags.DEFINE_integer("instances", 200, "Of every task and length.", lower_bound=2)
_BUDGETS = flags.DEFINE_list("budgets", ["128", "256", "512", "1024", "2048", "4096"], "Tokens attended to.")
_THRESHOLDS = flags.DEFINE_list("thresholds", ["0.5", "0.7", "0.8", "0.9", "0.95", "0.98", "0.99"], "Of PSA.")
_METHODS = flags.DEFINE_list("methods", ["all"], f"Of {', '.join(methods.METHODS)}, oracle, window; all.")
_STEPS = flags.DEFINE_integer("steps", 192, "Decode steps at most; a longer answer is judged by its beginning.")
_TOKENS = flags.DEFINE_integer("tokens_at_once", 1 << 17, "Of a batch of instances.", lower_bound=1)

BLOCK_TOKENS = (32, 16, 64)  # the first is that of all other comparisons
STEP_BUCKETS = (96, 192)  # steps are padded to one of these, or to --steps

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


def cases(names: list[str], budgets: list[int], thresholds: list[float]) -> Iterator[Case]:
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
class Sequences:
  """Instances of one task, padded to one length."""

  tokens: np.ndarray  # [B, T] int32
  start: np.ndarray  # [B] int32, the first decode step: where the question begins
  answers: np.ndarray  # [B, n] bool, the steps that predict a token of the answer

  @classmethod
  def of(cls, model: Model, task: str, n_tokens: int, seeds: range, most_steps: int) -> Sequences:
    width = -(-n_tokens // max(BLOCK_TOKENS)) * max(BLOCK_TOKENS)
    tokens, start, end = np.zeros((len(seeds), width), np.int32), [], []
    first_answer = []
    for row, seed in zip(tokens, seeds, strict=True):
      instance = tasks.make(task, n_tokens, seed, model.tokenizer, split="eval")
      prompt = model.tokenizer.encode(instance.prompt)
      ids = prompt + model.tokenizer.encode(instance.completion, add_special_tokens=False)
      row[: len(ids)] = ids
      context = instance.prompt.rindex("\nQuestion:")
      start.append(len(model.tokenizer.encode(instance.prompt[:context])))
      first_answer.append(len(prompt))
      end.append(len(ids))
    needed = max(b - a for a, b in zip(start, end, strict=True)) - 1
    n = min(most_steps, next((size for size in STEP_BUCKETS if size >= needed), most_steps))
    predicted = np.array(start)[:, None] + np.arange(n)[None] + 1
    answers = (predicted >= np.array(first_answer)[:, None]) & (predicted < np.array(end)[:, None])
    return cls(tokens, np.array(start, np.int32), answers)


def measure(model: Model, params: Any, task: str, n_tokens: int, wanted: list[Case]) -> Iterator[tuple[Case, Row]]:
  """Rows of a task at a length, without the interval, each with a list of what was right."""
  at_once = max(1, _TOKENS.value // n_tokens)
  parts: dict[str, list[dict[str, np.ndarray]]] = {case.name: [] for case in wanted}
  for first in tqdm(range(0, _INSTANCES.value, at_once), desc=f"{task} {n_tokens}", leave=False, disable=None):
    seeds = range(first, min(first + at_once, _INSTANCES.value))
    batch = Sequences.of(model, task, n_tokens, seeds, _STEPS.value)
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


def summary(model: Model, case: Case, batch: Sequences, found: Any) -> dict[str, np.ndarray]:
  """One number an instance of each quantity, over its answer's steps, layers and heads."""
  cfg, size = model.config, case.config.cache.block_tokens
  answers = batch.answers
  mean = lambda x: (x * answers).sum(1) / answers.sum(1)  # noqa: E731  x [B, n]
  attended = found.blocks.mean((2, 3))  # [B, n]
  exist = (batch.start[:, None] + np.arange(answers.shape[1])[None]) // size
  block, digest = 2 * size * cfg.head_dim, methods.METHODS[case.config.sparse.method].vectors * cfg.head_dim
  digest = 0 if case.config.sparse.policy == "dense" else digest
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


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  runtime.configure()
  logging.set_verbosity(logging.WARNING)
  out = pathlib.Path(_OUT.value)
  every = [*methods.METHODS, "oracle", "window"]
  try:
    names = _chosen("methods", _METHODS.value, every)
    of_tasks = _chosen("tasks", _TASKS.value, list(tasks.TASKS))
    lengths, budgets = ([int(n) for n in flag.value] for flag in (_LENGTHS, _BUDGETS))
    wanted = list(cases(names, budgets, [float(x) for x in _THRESHOLDS.value]))
    model = load_model(_MODEL.value)
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  out.mkdir(parents=True, exist_ok=True)
  file = out / "results.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
  done = {(row["task"], row["tokens"], row["case"]) for row in rows}
  params = jax.device_put(model.params)
  for n_tokens in lengths:
    for task in of_tasks:
      left = [case for case in wanted if (task, n_tokens, case.name) not in done]
      if not left:
        continue
      if left[0].family != "dense":
        left = [wanted[0], *left]
      measured = list(measure(model, params, task, n_tokens, left))
      dense = measured[0][1]["right_each"]
      for case, row in measured:
        if (task, n_tokens, case.name) not in done:
          key = dict(task=task, group=tasks.TASKS[task].group, tokens=n_tokens, case=case.name)
          key |= dict(family=case.family, at=case.at, difference=interval(row["right_each"], dense))
          rows.append(key | row)
          with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
  (out / "results.md").write_text(table(rows))
  for n_tokens in sorted({row["tokens"] for row in rows}):
    plot([row for row in rows if row["tokens"] == n_tokens], out / f"accuracy_{n_tokens}.png")
  print(table(rows))
  brief = {f"{row['task']} {row['tokens']} {row['case']}": [row["accuracy"], row["bytes"]] for row in rows}
  print(json.dumps(brief), flush=True)


def _chosen(flag: str, given: list[str], known: list[str]) -> list[str]:
  if given == ["all"]:
    return known
  if unknown := [name for name in given if name not in known]:
    raise ValueError(f"--{flag}: no {', '.join(unknown)}; there are {', '.join(known)}")
  return given


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


def plot(rows: list[Row], file: pathlib.Path) -> None:
  """Mean accuracy of the retrieval tasks against the share of dense's bytes that is read."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  chosen = [row for row in rows if row["group"] == "retrieval"]
  for family in dict.fromkeys(row["family"] for row in chosen):
    points = {}
    for row in chosen:
      if row["family"] == family:
        points.setdefault(row["at"], []).append((row["bytes"], row["accuracy"]))
    line = sorted(np.mean(values, 0).tolist() for values in points.values())
    axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=family)
  axes.set(xscale="log", xlabel="bytes read, of dense", ylabel="accuracy", ylim=(0, 1.02))
  axes.legend(fontsize=7, ncols=2)
  figure.savefig(file, dpi=150)
  plt.close(figure)


if __name__ == "__main__":
  app.run(main)
