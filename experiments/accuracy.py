"""What a model still answers when it attends to part of its context: selection methods by budget, PSA by threshold.

  python -m experiments.accuracy --model=DIR --out=/tmp/accuracy --lengths=16384 --tasks=single_text,multi_key

Every setting answers the same instances of the generated tasks (`sparse_serve_jax.evaluation.accuracy` says how). The
folder of --out gets results.jsonl, a row for each task, length and setting: accuracy with the 95 % interval of its
difference from dense (paired bootstrap), blocks attended, bytes read with digests as a share of dense, attention mass
attended, and how often PSA's estimate overstates it. What is there is not run again. Then tables (results.md) and, per
length, a plot of accuracy against bytes. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
from absl import app, flags, logging

from sparse_serve_jax import runtime
from sparse_serve_jax.evaluation import accuracy, methods, tasks
from sparse_serve_jax.evaluation.accuracy import Row
from sparse_serve_jax.models import load_model

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
    wanted = list(accuracy.cases(names, budgets, [float(x) for x in _THRESHOLDS.value]))
    model = load_model(_MODEL.value)
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  out.mkdir(parents=True, exist_ok=True)
  file = out / "results.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
  done = {(row["task"], row["tokens"], row["case"]) for row in rows}
  setting = dict(model=str(pathlib.Path(_MODEL.value).resolve()), instances=_INSTANCES.value, steps=_STEPS.value)
  if others := [row for row in rows if any(row[key] != value for key, value in setting.items())]:
    raise app.UsageError(
      f"{file} has rows of another run: { ({key: others[0][key] for key in setting}) }, not {setting}"
    )
  params = jax.device_put(model.params)
  for n_tokens in lengths:
    for task in of_tasks:
      left = [case for case in wanted if (task, n_tokens, case.name) not in done]
      if not left:
        continue
      if left[0].family != "dense":
        left = [wanted[0], *left]
      at_once = max(1, _TOKENS.value // n_tokens)
      options = _INSTANCES.value, at_once, _STEPS.value
      measured = list(accuracy.measure(model, params, task, n_tokens, left, *options))
      dense = measured[0][1]["right_each"]
      for case, row in measured:
        if (task, n_tokens, case.name) not in done:
          key = dict(task=task, group=tasks.TASKS[task].group, tokens=n_tokens, case=case.name)
          key |= dict(family=case.family, at=case.at, difference=accuracy.interval(row["right_each"], dense))
          key |= setting
          rows.append(key | row)
          with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
  (out / "results.md").write_text(accuracy.table(rows))
  for n_tokens in sorted({row["tokens"] for row in rows}):
    plot([row for row in rows if row["tokens"] == n_tokens], out / f"accuracy_{n_tokens}.png")
  print(accuracy.table(rows))
  brief = {f"{row['task']} {row['tokens']} {row['case']}": [row["accuracy"], row["bytes"]] for row in rows}
  print(json.dumps(brief), flush=True)


def _chosen(flag: str, given: list[str], known: list[str]) -> list[str]:
  if given == ["all"]:
    return known
  if unknown := [name for name in given if name not in known]:
    raise ValueError(f"--{flag}: no {', '.join(unknown)}; there are {', '.join(known)}")
  return given


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
