"""Measures what a model still answers when it attends to part of its context.

  sparse-serve accuracy --model=DIR --out=/tmp/accuracy
  sparse-serve accuracy --model=FILE.gguf --parts=text --text=notes/ --text_lengths=8192 --instances=64

There are four parts, of which --parts chooses:

  tasks        Every setting (selection methods by budget, PSA by threshold) answers the same instances of the
               generated tasks.
  text         Every setting predicts the same ordinary text, long and short: nats a token, and how often its most
               likely next token is that of dense attention. The text is generated, or that of --text and
               --longbench_dir, cut into as many pieces as --instances says, that share no token.
  prefill      The same tasks and texts, of which prompts are read sparsely and the rest is decoded densely: nats of
               both and accuracy by the share of earlier blocks that tiles of queries read, for --methods and the axes
               layers and heads.
  selections   What budgets and PSA select while a long answer is decoded: overlap of steps, working sets, traces.

Settings are those of --methods, --budgets and --thresholds, and dense. --axes adds variations.

The folder of --out gets rows for each task, length and setting, results.jsonl of the first two parts, prefill.jsonl and
reuse.jsonl of the others, traces/*.npz, and made of these results.md, results.csv, summary.json and plots. What is
there is not run again. With --ray each task and length is one process's. The last line of stdout is one JSON object:
how many rows there are, what dense attention answers, and its loss on text.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from absl import flags

from pallas_kernels.stop import REST
from sparse_serve_jax import cluster, results, runtime, tasks
from sparse_serve_jax.attention import METHODS
from sparse_serve_jax.commands import cli
from sparse_serve_jax.evaluation import report, selections
from sparse_serve_jax.evaluation.accuracy import LEAST_TOKENS, TEXT
from sparse_serve_jax.evaluation.cases import AXES, PREFILL_AXES, Case, cases, prefill_cases
from sparse_serve_jax.evaluation.corpus import Corpus
from sparse_serve_jax.evaluation.study import Amounts, Bench, Cell, Study, check
from sparse_serve_jax.models import Model
from sparse_serve_jax.models.here import load_model_for_others, load_model_here

PARTS = ("tasks", "text", "prefill", "selections")

_MODEL, _DTYPE = cli.define_model()
with cli.group("What is asked"):
  _PARTS = flags.DEFINE_list("parts", ["all"], f"Some of {', '.join(PARTS)}; all.")
  _TASKS = flags.DEFINE_list(
    "tasks",
    ["all"],
    "Names of generated tasks, for the parts tasks and prefill; all. Selections are of those with long answers.",
  )
  _LENGTHS = flags.DEFINE_list("lengths", ["16384"], "Tokens of prompt and answer.")
  _TEXT_LENGTHS = flags.DEFINE_list("text_lengths", ["512", "16384"], "Tokens, for the parts text and prefill.")
  _TEXT = flags.DEFINE_list(
    "text",
    None,
    "UTF-8 files, and folders of .txt and .md files, of ordinary text; by default it is generated.",
  )
  _LONGBENCH = flags.DEFINE_string(
    "longbench_dir", None, "A folder with config/ and data/; contexts of its rows are ordinary text."
  )
  _LONGBENCH_TASKS = flags.DEFINE_list("longbench_tasks", None, "Names; by default all whose rows are there.")
  _CHAT = flags.DEFINE_bool(
    "text_chat", False, "Texts of files and rows are a user's message in the model's chat template."
  )
with cli.group("Settings"):
  _METHODS = flags.DEFINE_list("methods", ["all"], f"Some of {', '.join(METHODS)}, oracle, window; all.")
  _BUDGETS = flags.DEFINE_list("budgets", ["128", "256", "512", "1024", "2048", "4096"], "Tokens attended to.")
  _THRESHOLDS = flags.DEFINE_list(
    "thresholds", ["0.5", "0.8", "0.9", "0.95", "0.98", "0.99", "0.999"], "Thresholds of PSA."
  )
  _SHARES = flags.DEFINE_list(
    "prefill_shares", ["0.125", "0.25", "0.5", "0.75"], "Shares of the blocks before a tile, for the part prefill."
  )
  _PREFILL_THRESHOLDS = flags.DEFINE_list(
    "prefill_thresholds",
    ["0.5", "0.8", "0.9", "0.95", "0.98"],
    "Shares of their estimated mass, for the part prefill and methods whose scores estimate it.",
  )
  _AXES = flags.DEFINE_list(
    "axes", None, f"Variations, some of {', '.join(AXES)}; all. By default all with --methods=all, else none."
  )
  _RULES = flags.DEFINE_list("rules", ["all"], f"For the axis rules, some of {', '.join(REST)}; all.")
with cli.group("How much"):
  _INSTANCES = flags.DEFINE_integer("instances", 200, "Instances of every task and length.", lower_bound=2)
  _STEPS = flags.DEFINE_integer(
    "steps", 96, "Most decode steps; a longer answer is judged by its beginning.", lower_bound=1
  )
  _REQUESTS = flags.DEFINE_integer("requests", 4, "Long answers, for the part selections.", lower_bound=1)
  _TRACE_STEPS = flags.DEFINE_integer(
    "trace_steps", 256, "Most decode steps of a long answer, for the part selections.", lower_bound=selections.MOST + 1
  )
  _TOKENS = flags.DEFINE_integer(
    "tokens_at_once", 1 << 17, "Most tokens of a batch of instances; fewer if memory is short.", lower_bound=1
  )
  _WORKERS = flags.DEFINE_integer("workers", 4, "Processes that make instances.", lower_bound=0)
_RAY = cli.define_ray()
_OUT = cli.define_out("Folder of results.")
_VERBOSE = cli.define_verbose()


def main() -> None:
  parts, names = cli.chosen("parts", _PARTS.value, PARTS), cli.chosen("tasks", _TASKS.value, list(tasks.TASKS))
  methods = cli.chosen("methods", _METHODS.value, [*METHODS, "oracle", "window"])
  by_default = ["all"] if _METHODS.value == ["all"] else []
  axes = cli.chosen("axes", by_default if _AXES.value is None else _AXES.value, list(AXES))
  lengths, text_lengths, budgets = (cli.numbers(flag, int) for flag in (_LENGTHS, _TEXT_LENGTHS, _BUDGETS))
  asked = [*(text_lengths if {"text", "prefill"} & set(parts) else [])]
  asked += lengths if {"tasks", "prefill", "selections"} & set(parts) else []
  if short := [n for n in asked if n < LEAST_TOKENS]:
    raise ValueError(f"{short[0]} tokens are too few to read a part of; at least {LEAST_TOKENS}")
  if parts == ["prefill"]:
    _refuse("methods", _METHODS, METHODS)
    _refuse("axes", _AXES, PREFILL_AXES)
  rests = cli.chosen("rules", _RULES.value, list(REST))
  wanted = list(cases(methods, budgets, cli.numbers(_THRESHOLDS, float), axes, rests, max(asked, default=0)))
  shares = [cli.numbers(flag, float) for flag in (_SHARES, _PREFILL_THRESHOLDS)]
  wanted += list(prefill_cases([name for name in methods if name in METHODS], shares[0], shares[1], axes))
  if not (cells := _cells(parts, text_lengths, lengths, names)):
    raise ValueError("nothing is measured: --parts, --tasks, --lengths or --text_lengths chooses none")
  text = _corpus()
  out = results.take_folder(_OUT.value)
  runtime.configure()
  model = (load_model_for_others if _RAY.value else load_model_here)(_MODEL.value, dtype=_DTYPE.value)
  if too_long := [n for n in asked if n > model.config.max_context]:
    raise ValueError(f"the model's context is {model.config.max_context} tokens, too short for {too_long}")
  amounts = Amounts(_INSTANCES.value, _STEPS.value, _REQUESTS.value, _TRACE_STEPS.value, text)
  study = _measured(model, out, wanted, amounts, cells)
  rows, prefill, reuse = (study.rows(name, cells) for name in ("results", "prefill", "reuse"))
  told = report.write(out, rows, reuse, prefill)
  try:
    from sparse_serve_jax.plots import accuracy as plots  # slow to import
    from sparse_serve_jax.plots.folder import made_by
  except ImportError as error:
    print(f"no plots, they need the packages of '.[eval]': {error}", file=sys.stderr)
  else:
    plots.write(out, told, reuse, made_by(out))
  cli.end_with(report.markdown(told), report.in_short(told) | {"rows": len(rows) + len(prefill), "out": str(out)})


def _refuse(name: str, flag: flags.FlagHolder[Any], possible: Collection[str]) -> None:
  """What is asked for by name and the part prefill has not."""
  if none := [of for of in flag.value or () if of not in possible and of != "all"]:
    raise ValueError(f"--{name}: the part prefill has no {none[0]!r}, but {', '.join(possible)}")


def _cells(parts: list[str], text_lengths: list[int], lengths: list[int], names: list[str]) -> list[Cell]:
  """The shorter parts first."""
  long_outputs = [task.name for task in tasks.TASKS.values() if task.group == "long_output"]
  asked, text = list(itertools.product(lengths, names)), [(n, TEXT) for n in text_lengths]
  of_parts = {
    "selections": [Cell("reuse", task, n) for n, task in itertools.product(lengths, long_outputs)],
    "text": [Cell("results", task, n) for n, task in text],
    "prefill": [Cell("prefill", task, n) for n, task in [*text, *asked]],
    "tasks": [Cell("results", task, n) for n, task in asked],
  }
  return [cell for part, of in of_parts.items() if part in parts for cell in of]


def _measured(model: Model, out: pathlib.Path, wanted: list[Case], amounts: Amounts, cells: list[Cell]) -> Study:
  """With rows of all cells."""
  how = amounts, _TOKENS.value, _WORKERS.value
  study = Study(model, out, wanted, amounts, cluster.once(results.provenance)["device"] if _RAY.value else None)
  left = list(filter(study.left, cells))
  check(model.tokenizer, left, amounts)
  if not _RAY.value:
    bench = Bench(model, *how)
    for cell in left:
      bench.check(cell)
    for cell in cells:
      study.measure(cell, bench.measure)
    return study
  make = functools.partial(_bench, _MODEL.value, _DTYPE.value, *how)
  cluster.spread(make, cells, lambda call, cell: study.measure(cell, functools.partial(call, "measure")))
  return study


def _bench(model: str, dtype: str | None, *how: Any) -> Bench:
  return Bench(load_model_here(model, dtype), *how)


def _corpus() -> Corpus | None:
  """What the flags say of texts; None: they are generated."""
  if _TEXT.value or _LONGBENCH.value is not None:
    return Corpus(tuple(_TEXT.value or ()), _LONGBENCH.value, tuple(_LONGBENCH_TASKS.value or ()), _CHAT.value)
  if _CHAT.value or _LONGBENCH_TASKS.value:
    raise ValueError("--text_chat is of texts of --text or --longbench_dir, and --longbench_tasks of --longbench_dir")
  return None


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, interrupted="the same command goes on from {out}", argv=argv)
