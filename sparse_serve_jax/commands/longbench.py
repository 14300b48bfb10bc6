"""Evaluates a model on LongBench v1 and LongBench-E.

  sparse-serve longbench --longbench_dir=DIR --model=PATH --config=psa --tasks=all --out=/tmp/run
  sparse-serve longbench --score_only=/tmp/run

The folder of --out gets a file of predictions a task, in the official format, result.json with the scores of all
predictions in the folder, also official, and run.json, what made them. The same command goes on where the last one
ended, however that was. Tasks that cannot be read are reported at the end, with exit status 1. A line says why scores
are not official, if they are not: of some tasks, or of some rows. Stdout has a table and as its last line one JSON
object: scores, rows, averages (`sparse_serve_jax.evaluation.longbench.averages` says which), unofficial, errors.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn, cast

from absl import flags

from sparse_serve_jax import progress, results, runtime
from sparse_serve_jax.commands import cli
from sparse_serve_jax.config import load_config, override
from sparse_serve_jax.evaluation import longbench
from sparse_serve_jax.evaluation.scorers import CodeSim
from sparse_serve_jax.workloads.longbench import in_template

_MODEL, _DTYPE = cli.define_model(default="random:tiny")
_CONFIG, _SET = cli.define_serving()
with cli.group("What is asked"):
  _LONGBENCH = flags.DEFINE_string("longbench_dir", None, "A folder with config/ and data/.")
  _TASKS = flags.DEFINE_list(
    "tasks", ["all"], "Names; all stands for the 21 of v1, all_e and <name>_e for LongBench-E's."
  )
  _LIMIT = flags.DEFINE_integer("limit", None, "Rows of each task, from its first on.", lower_bound=1)
  _MAX_PROMPT = flags.DEFINE_integer(
    "max_prompt_tokens", None, "Tokens above which prompts lose their middle; by default what has room in the context.",
    lower_bound=2,
  )  # fmt: skip
  _CHAT = flags.DEFINE_bool("chat_template", True, "Use the model's; --nochat_template for a base model.")
_STRICT = cli.define_strict()
with cli.group("Scores"):
  _SCORE_ONLY = flags.DEFINE_string("score_only", None, "Only scores a folder's predictions; writes to --out only.")
  _CODE_SIM = flags.DEFINE_enum("code_sim", "difflib", ["difflib", "indel"], "Compares code; difflib is official.")
_OUT = cli.define_out("Folder for predictions and result.json.", required=False)
_VERBOSE = cli.define_verbose()


def main() -> int:
  """Predicts unless --score_only, then scores."""
  if _SCORE_ONLY.value is not None:
    folder, unread = pathlib.Path(_SCORE_ONLY.value), {}
    if not folder.is_dir():
      raise ValueError(f"--score_only: {folder} is no folder")
  elif _OUT.value is None or _LONGBENCH.value is None:
    raise ValueError("--longbench_dir and --out are needed, or --score_only")
  else:
    folder = pathlib.Path(_OUT.value)
    unread = _predict(longbench.Release.read(_LONGBENCH.value), folder)
  code_sim = cast(CodeSim, _CODE_SIM.value)
  scores, unscored = longbench.score_folder(folder, code_sim, but=unread)
  errors = unread | unscored
  if not scores and not errors:
    raise ValueError(f"{folder} holds no predictions")
  of = {name: score.value for name, score in scores.items()}
  if _OUT.value is not None:
    results.replace_json(results.make_folder(_OUT.value) / "result.json", of)
  rows, averages = {name: score.n_rows for name, score in scores.items()}, longbench.averages(scores)
  unofficial = longbench.unofficial(scores, code_sim)
  table = longbench.table(scores) + (f"\nunofficial: {'; '.join(unofficial)}" if unofficial else "")
  cli.end_with(table, {"scores": of, "rows": rows, "averages": averages, "unofficial": unofficial, "errors": errors})
  for name, error in errors.items():
    print(f"error: {name}: {error}", file=sys.stderr)
  return int(bool(errors))


def _predict(release: longbench.Release, out: pathlib.Path) -> dict[str, str]:
  """Writes the predictions that are not in `out` yet. Returns what is wrong with which tasks."""
  config = override(load_config(_CONFIG.value), _SET.value)
  config.sparse.refuse_drawn("LongBench")
  names = [name for given in _TASKS.value for name in longbench.NAMES.get(given, [given])]
  results.take_folder(out)
  runtime.configure()
  # Scoring alone needs none of these.
  from sparse_serve_jax.models.here import load_model_here
  from sparse_serve_jax.serving import sizes
  from sparse_serve_jax.serving.engine import Engine
  from sparse_serve_jax.serving.executor import JaxExecutor

  model, chat = load_model_here(_MODEL.value, dtype=_DTYPE.value), _CHAT.value
  if chat:
    try:
      in_template(model.tokenizer, "")
    except ValueError as error:
      raise ValueError(f"{error}; or give --nochat_template") from error
  executor = JaxExecutor(config, model)
  engine = Engine(executor)
  max_prompt = _MAX_PROMPT.value or release.room_for_prompts(model.tokenizer, engine.max_request_tokens, chat)
  prompts = {"sha256": release.digest, "max_tokens": max_prompt, "chat_template": chat}
  results.claim(out, {"config": config, "model": {"name": model.name, "config": model.config}, "prompts": prompts})
  results.note(out, {"sizes": sizes.used(executor.config, executor.shape)})
  run = longbench.Run(release, names, out, _LIMIT.value, _STRICT.value)
  try:
    coming = run.predict(engine, model.tokenizer, max_prompt, chat, max_live=executor.config.cache.lanes)
    with progress.bar(initial=run.n_done, total=run.n_rows, unit="row") as bar:
      for _ in coming:
        bar.update()
  except KeyboardInterrupt:
    engine.wait()
    raise
  return run.errors


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, interrupted="the same command goes on from {out}", argv=argv)
