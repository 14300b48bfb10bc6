"""What a model still answers when it attends to part of its context, what PSA reads for that, and what comes back.

  python -m experiments.accuracy --model=DIR --out=/tmp/accuracy

Three parts, of which --parts chooses:

  tasks        Every setting (selection methods by budget, PSA and a certified stop by threshold) answers the same
               instances of the generated tasks.
  text         Every setting predicts the same ordinary text that no training saw, long and short: nats a token.
  selections   What budgets and PSA select while a long answer is decoded: overlap of steps, working sets, traces.

The folder of --out gets rows for each task, length and setting, results.jsonl of the first two parts and reuse.jsonl of
the third, traces/*.npz, and made of these results.md, summary.json and plots. What the rows are is said by
`sparse_serve_jax.evaluation`: accuracy.measure, selections.reuse and report. What is there is not run again. The last
line of stdout is one JSON object, summary.json without its longest parts.
"""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import cli
from sparse_serve_jax import files, runtime, tasks
from sparse_serve_jax.attention import METHODS
from sparse_serve_jax.evaluation import accuracy, report, selections
from sparse_serve_jax.evaluation.accuracy import TEXT, Case, Row, Sample
from sparse_serve_jax.models import Model, load_model, place_params
from sparse_serve_jax.tasks import text as texts

PARTS = ("tasks", "text", "selections")

_MODEL = flags.DEFINE_string("model", None, "A model directory.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of results.", required=True)
_PARTS = flags.DEFINE_list("parts", ["all"], f"Of {', '.join(PARTS)}; all.")
_TASKS = flags.DEFINE_list("tasks", ["all"], "Of the part tasks: names of generated tasks; all.")
_LENGTHS = flags.DEFINE_list("lengths", ["16384"], "Tokens of prompt and answer.")
_TEXT_LENGTHS = flags.DEFINE_list("text_lengths", ["512", "16384"], "Of the part text: tokens.")
_INSTANCES = flags.DEFINE_integer("instances", 200, "Of every task and length.", lower_bound=2)
_REQUESTS = flags.DEFINE_integer("requests", 4, "Of the part selections: instances of a long answer.", lower_bound=1)
_BUDGETS = flags.DEFINE_list("budgets", ["128", "256", "512", "1024", "2048", "4096"], "Tokens attended to.")
_THRESHOLDS = flags.DEFINE_list("thresholds", ["0.5", "0.8", "0.9", "0.95", "0.98", "0.99", "0.999"], "Of PSA.")
_METHODS = flags.DEFINE_list("methods", ["all"], f"Of {', '.join(METHODS)}, oracle, window; all.")
_TEXT = flags.DEFINE_string("text", None, "A UTF-8 file that ordinary text is taken from; by default it is generated.")
_STEPS = flags.DEFINE_integer("steps", 96, "Decode steps at most; a longer answer is judged by its beginning.")
_TRACE_STEPS = flags.DEFINE_integer(
  "trace_steps", 256, "Of the part selections: decode steps of an answer at most.", lower_bound=selections.MOST + 1
)
_TOKENS = flags.DEFINE_integer("tokens_at_once", 1 << 17, "Of a batch of instances.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", 4, "Processes that make instances.", lower_bound=0)
_VERBOSE = flags.DEFINE_bool("verbose", False, "Show where an error comes from.")

_LONG = ("by_task", "psa_by_head")  # in summary.json only
FORMAT = 2  # of rows; another one when they tell other things, or the same in another way


class Rows:
  """The rows of one run in a .jsonl file, one for each task, length and case."""

  def __init__(self, file: pathlib.Path, setting: Row):
    """Reads what is there.

    Raises:
      ValueError: rows of another setting.
    """
    self.file, self.setting = file, setting
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):  # a run was ended while it wrote
      file.write_text("".join(lines[:-1]), encoding="utf-8")
      lines.pop()
    self.all: list[Row] = [row for _, row in files.read_lines(file)] if lines else []
    for row in self.all:
      if (other := {key: row.get(key) for key in setting}) != setting:
        raise ValueError(f"{file} has rows of another run, give another --out: {other}, not {setting}")

  def left(self, task: str, n_tokens: int, wanted: Sequence[Case]) -> list[Case]:
    """The cases without a row.

    Raises:
      ValueError: a row's case of the same name was configured in another way.
    """
    done = {row["case"]: row["config"] for row in self.all if (row["task"], row["tokens"]) == (task, n_tokens)}
    if other := [case.name for case in wanted if done.get(case.name, _crc(case)) != _crc(case)]:
      raise ValueError(f"{self.file} has rows of another {', '.join(other)}, give another --out")
    return [case for case in wanted if case.name not in done]

  def add(self, task: str, n_tokens: int, case: Case, told: Row) -> None:
    group = TEXT if task == TEXT else tasks.TASKS[task].group
    key = dict(
      task=task, group=group, tokens=n_tokens, case=case.name, series=case.series, at=case.at, config=_crc(case)
    )
    self.all.append(key | told | self.setting)
    with self.file.open("a", encoding="utf-8") as lines:
      lines.write(json.dumps(self.all[-1]) + "\n")


def _crc(case: Case) -> str:
  """Of all that a case is."""
  return f"{zlib.crc32(repr(case).encode()):08x}"


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  with cli.endings(_VERBOSE.value, f"; the same command goes on from {_OUT.value}"):
    _main()


def _main() -> None:
  runtime.configure()
  logging.set_verbosity(logging.WARNING)
  parts = _chosen("parts", _PARTS.value, PARTS)
  of_tasks = _chosen("tasks", _TASKS.value, list(tasks.TASKS))
  names = _chosen("methods", _METHODS.value, [*METHODS, "oracle", "window"])
  lengths, text_lengths, budgets = (_numbers(flag, int) for flag in (_LENGTHS, _TEXT_LENGTHS, _BUDGETS))
  wanted = list(accuracy.cases(names, budgets, _numbers(_THRESHOLDS, float)))
  model = load_model(_MODEL.value)
  asked = [*(text_lengths if "text" in parts else []), *(lengths if {"tasks", "selections"} & set(parts) else [])]
  if too_long := [n for n in asked if n > model.config.max_context]:
    raise ValueError(f"the model's context is {model.config.max_context} tokens, too short for {too_long}")
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  # A checkpoint that was trained on has another final norm.
  name = f"{model.name} {zlib.crc32(np.asarray(model.params['final_norm']).tobytes()):08x}"
  of = dict(model=name, prompts=_prompts(model), format=FORMAT)
  rows = Rows(out / "results.jsonl", of | dict(instances=_INSTANCES.value, steps=_STEPS.value))
  reuse = Rows(out / "reuse.jsonl", of | dict(requests=_REQUESTS.value, trace_steps=_TRACE_STEPS.value))
  params = place_params(model)
  if "selections" in parts:  # the shorter parts first
    for n_tokens in lengths:
      for task in [task.name for task in tasks.TASKS.values() if task.group == "long_output"]:
        _trace(model, params, task, n_tokens, wanted, reuse)
  if "text" in parts:
    for n_tokens in text_lengths:
      _measure(model, params, TEXT, n_tokens, wanted, rows)
  if "tasks" in parts:
    for n_tokens in lengths:
      for task in of_tasks:
        _measure(model, params, task, n_tokens, wanted, rows)
  _report(out, rows.all, reuse.all)


def _prompts(model: Model) -> str:
  """Another one when tasks are written in another way."""
  text = texts.user_text(_TEXT.value) if _TEXT.value else texts.sentences
  each = [tasks.make(name, 2048, 0, model.tokenizer, split="eval", text=text).text for name in tasks.TASKS]
  return f"{zlib.crc32(''.join(each).encode()):08x}"


def _measure(model: Model, params: Any, task: str, n_tokens: int, wanted: list[Case], rows: Rows) -> None:
  """Adds the rows of a task and length that are missing."""
  if left := rows.left(task, n_tokens, wanted):
    sample = Sample(task, n_tokens, _INSTANCES.value, max(1, _TOKENS.value // n_tokens), _STEPS.value, _TEXT.value)
    for case, row in accuracy.measure(model, params, sample, left, _WORKERS.value):
      rows.add(task, n_tokens, case, row)


def _trace(model: Model, params: Any, task: str, n_tokens: int, wanted: list[Case], rows: Rows) -> None:
  """Adds the rows of a task and length that are missing, and for each budget a trace."""
  wanted = [case for case in wanted if case.series in (accuracy.DEFAULT_METHOD, accuracy.PSA)]
  if left := rows.left(task, n_tokens, wanted):
    folder = rows.file.parent / "traces"
    folder.mkdir(exist_ok=True)
    # Longer steps than those of the other parts, hence fewer at once.
    sample = Sample(
      task, n_tokens, _REQUESTS.value, max(1, _TOKENS.value // n_tokens // 2), _TRACE_STEPS.value, _TEXT.value
    )
    for case, trace in selections.measure(model, params, sample, left):
      if not case.stops:
        trace.save(folder / f"{task}_{n_tokens}_{case.at:g}.npz")
      rows.add(task, n_tokens, case, selections.reuse(trace) | dict(traced=trace.selected.shape[1]))


def _report(out: pathlib.Path, rows: list[Row], reuse: list[Row]) -> None:
  """Writes and prints tables and summary, and writes plots."""
  told = report.summary(rows, reuse)
  table = report.markdown(told)
  (out / "results.md").write_text(table, encoding="utf-8")
  (out / "summary.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
  print(table)
  print(json.dumps({key: value for key, value in told.items() if key not in _LONG}), flush=True)
  _plot(out, told, reuse)


def _plot(out: pathlib.Path, told: dict[str, list[Row]], reuse: list[Row]) -> None:
  from experiments import accuracy_plots as plots  # matplotlib is slow to import

  def by(entries: list[Row], *keys: str) -> dict[str, list[Row]]:
    names: dict[str, list[Row]] = {}
    for entry in entries:
      names.setdefault("_".join(str(entry[key]) for key in keys), []).append(entry)
    return names

  for name, entries in by(told["accuracies"], "group", "tokens").items():
    if len(entries) == 1:  # dense alone
      continue
    plots.accuracy_by_bytes(entries, out / f"accuracy_{name}.png")
  for name, entries in by(told["psa_by_head"], "group", "tokens").items():
    plots.blocks_by_head(plots.nearest(entries), out / f"psa_{name}.png")
  for name, entries in by(reuse, "task", "tokens").items():
    plots.reuse(entries, out / f"reuse_{name}.png")


def _chosen(flag: str, given: list[str], known: Sequence[str]) -> Sequence[str]:
  if given == ["all"]:
    return known
  if unknown := [name for name in given if name not in known]:
    raise ValueError(f"--{flag}: no {', '.join(unknown)}; there are {', '.join(known)}")
  return given


def _numbers(flag: flags.FlagHolder, kind: type) -> list:
  try:
    return sorted({kind(text) for text in flag.value})
  except ValueError:
    raise ValueError(f"--{flag.name}: {','.join(flag.value)} are not numbers") from None


if __name__ == "__main__":
  app.run(main)
