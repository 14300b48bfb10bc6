"""Evaluates a model on LongBench v1 and LongBench-E.

  python -m experiments.longbench --longbench_dir=DIR --model=PATH --config=psa --tasks=all --out=/tmp/run
  python -m experiments.longbench --score_only=/tmp/run

The folder of --out gets a file of predictions a task, in the official format, result.json with the scores of all
predictions in the folder, also official, and config.json. The same command goes on where the last one ended, however
that was. Tasks that cannot be read are reported at the end, with exit status 1. Stdout has a table and as its last line
one JSON object: scores, rows, averages (`sparse_serve_jax.evaluation.longbench.averages` says which), errors.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, cast

from absl import app, flags, logging
from tqdm import tqdm

from experiments import cli
from sparse_serve_jax import __version__, files, runtime
from sparse_serve_jax.config import load_config, override
from sparse_serve_jax.evaluation import longbench
from sparse_serve_jax.evaluation.scorers import CodeSim
from sparse_serve_jax.serving import metrics

_CONFIG = flags.DEFINE_string("config", "sparse_serve", "A name in configs/serving, or a JSON file.")
_SET = flags.DEFINE_multi_string("set", [], "Overrides of the configuration, such as cache.hbm_bytes=8GiB.")
_MODEL = flags.DEFINE_string("model", "random:tiny", "A model directory, or random:<name in configs/models>.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the model; by default its own.")
_LONGBENCH = flags.DEFINE_string("longbench_dir", None, "Folder with config/ and data/.")
_TASKS = flags.DEFINE_list("tasks", ["all"], "Names; all: the 21 of v1; all_e, <name>_e: of LongBench-E.")
_LIMIT = flags.DEFINE_integer("limit", None, "Rows of each task, from its first on.", lower_bound=1)
_MAX_PROMPT = flags.DEFINE_integer(
  "max_prompt_tokens",
  None,
  "Longer prompts lose their middle; by default what leaves room in the context.",
  lower_bound=2,
)
_CHAT = flags.DEFINE_bool("chat_template", True, "Use the model's; --nochat_template for a base model.")
_CODE_SIM = flags.DEFINE_enum("code_sim", "difflib", ["difflib", "indel"], "Of lines of code; difflib is official.")
_SCORE_ONLY = flags.DEFINE_string(
  "score_only", None, "Only score the predictions in this folder; writes to --out only."
)
_OUT = flags.DEFINE_string("out", None, "Folder for predictions and result.json.")
_VERBOSE = flags.DEFINE_bool("verbose", False, "Show where an error comes from.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  with cli.endings(_VERBOSE.value, f"; the same command goes on from {_OUT.value}" if _OUT.value else ""):
    errors = _main()
  for name, error in errors.items():
    print(f"error: {name}: {error}", file=sys.stderr)
  sys.exit(1 if errors else 0)


def _main() -> Mapping[str, str]:
  """Predicts unless --score_only, then scores. Returns what is wrong with which tasks."""
  out = None if _OUT.value is None else pathlib.Path(_OUT.value)
  if _SCORE_ONLY.value is not None:
    folder, unread = pathlib.Path(_SCORE_ONLY.value), {}
  elif out is None or _LONGBENCH.value is None:
    raise ValueError("--longbench_dir and --out are needed, or --score_only")
  else:
    folder, unread = out, _predict(longbench.Release.read(_LONGBENCH.value), out)
  scores, unscored = longbench.score_folder(folder, cast(CodeSim, _CODE_SIM.value), but=unread)
  errors = unread | unscored
  if not scores and not errors:
    raise ValueError(f"{folder} holds no predictions")
  result = {name: score.value for name, score in scores.items()}
  if out is not None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=4) + "\n")
  rows, averages = {name: score.n_rows for name, score in scores.items()}, longbench.averages(scores)
  print(_table(result, rows, averages))
  print(json.dumps({"scores": result, "rows": rows, "averages": averages, "errors": errors}), flush=True)
  return errors


def _predict(release: longbench.Release, out: pathlib.Path) -> dict[str, str]:
  """Writes the predictions that are not in `out` yet. Returns what is wrong with which tasks."""
  config = override(load_config(_CONFIG.value), _SET.value)
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  import jax  # scoring alone needs none of these

  from sparse_serve_jax.models import load_model
  from sparse_serve_jax.serving.engine import Engine
  from sparse_serve_jax.serving.executor import JaxExecutor

  model = load_model(_MODEL.value, dtype=_DTYPE.value)
  chat = _CHAT.value
  if chat:
    try:
      model.tokenizer.apply_chat_template([{"role": "user", "content": ""}])
    except ValueError as error:
      raise ValueError(f"{error}; or give --nochat_template") from error
  engine = Engine(JaxExecutor(config, model))
  max_prompt = _MAX_PROMPT.value or release.room_for_prompts(model.tokenizer, engine.max_request_tokens, chat)
  setting = {
    "config": dataclasses.asdict(config),
    "model": {"name": model.name, **dataclasses.asdict(model.config)},
    "prompts": {"sha256": release.digest, "max_tokens": max_prompt, "chat_template": chat},
  }
  device = {"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind, "count": jax.device_count()}
  _claim(out, setting, {"versions": {"sparse_serve_jax": __version__, "jax": jax.__version__}, "device": device})
  names = [name for given in _TASKS.value for name in longbench.NAMES.get(given, [given])]
  run = longbench.Run(release, names, out, _LIMIT.value)
  try:
    coming = run.predict(engine, model.tokenizer, max_prompt, chat, max_live=config.cache.rows)
    for _ in tqdm(coming, initial=run.n_done, total=run.n_rows, unit="row", disable=None):
      pass
  except KeyboardInterrupt:
    engine.wait()
    raise
  return run.errors


def _claim(folder: pathlib.Path, setting: Mapping[str, Any], about: Mapping[str, Any]) -> None:
  """Makes a folder hold predictions of one setting only: the first run writes config.json, the next ones must agree.

  Raises:
    ValueError: the folder holds predictions of another setting, or of one that is not known.
  """
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / "config.json"
  if not file.exists():
    if any(folder.glob("*.jsonl")):
      raise ValueError(f"{folder} has .jsonl files but no config.json that says what made them: give another --out")
    file.write_text(json.dumps({**setting, **about}, indent=2) + "\n")
    return
  made, wanted = _leaves(files.read_json(file)), _leaves(json.loads(json.dumps(setting)))
  changed = [f"{key} was {made.get(key)!r} and is {value!r}" for key, value in wanted.items() if made.get(key) != value]
  if changed:
    raise ValueError(f"{folder} holds predictions of another setting, give another --out: {'; '.join(changed)}")


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
  """Dotted name -> value of everything in nested objects."""
  if not isinstance(value, dict):
    return {path: value}
  return {k: v for key, part in value.items() for k, v in _leaves(part, f"{path}.{key}" if path else key).items()}


def _table(result: Mapping[str, Any], rows: Mapping[str, int], averages: Mapping[str, float | None]) -> str:
  """Scores of v1 and averages in the first column, of LongBench-E in those of its bins."""
  plain = {name: None if isinstance(value, dict) else value for name, value in result.items()}
  bins = {name: value for name, value in result.items() if isinstance(value, dict)}
  columns: dict[str, Mapping[str, Any]] = {"score": plain | dict(averages), "rows": rows}
  if bins:
    columns |= {key: {name: value[key] for name, value in bins.items()} for key in longbench.BINS}
  return metrics.table(columns)


if __name__ == "__main__":
  app.run(main)
