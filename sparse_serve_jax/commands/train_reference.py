r"""Trains a small model that retrieves over long contexts, from nothing, in pieces of any length.

  sparse-serve train-reference --config=reference --out=/tmp/reference --resume

The folder of --out gets a tokenizer, checkpoints, metrics.jsonl (a line every --log_every steps) and, at the end of
training or of --seconds, hf/: the model as a Hugging Face directory. This measures what it answers with dense attention
(of long answers, whether they begin right):

  sparse-serve accuracy --model=/tmp/reference/hf --out=/tmp/dense --parts=tasks --methods= --thresholds= \
    --lengths=2048,4096,8192,16384

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from sparse_serve_jax import results, runtime
from sparse_serve_jax.commands import cli
from sparse_serve_jax.config import find_config, read_config
from sparse_serve_jax.models import load_model
from sparse_serve_jax.training.config import TrainConfig
from sparse_serve_jax.training.run import Run

with cli.group("The run"):
  _CONFIG = flags.DEFINE_string("config", "reference", "What to train: a name in configs/training, or a JSON file.")
  _RESUME = flags.DEFINE_bool("resume", False, "Goes on with the run in --out, if there is one.")
  _START = flags.DEFINE_string("start_from", None, "A model directory: its weights and tokenizer begin a new run.")
  _SECONDS = flags.DEFINE_float("seconds", float("inf"), "Seconds to train; then the run is saved.", lower_bound=0)
  _WORKERS = flags.DEFINE_integer("workers", 8, "Processes that make training sequences.", lower_bound=0)
  _LOG_EVERY = flags.DEFINE_integer("log_every", 50, "Steps of a row of metrics.jsonl.", lower_bound=1)
_OUT = cli.define_out("Folder of the run.")
_VERBOSE = cli.define_verbose()


def main() -> None:
  config = read_config(TrainConfig, find_config("training", _CONFIG.value))
  out = results.take_folder(_OUT.value)
  if Run.is_in(out) and not _RESUME.value:
    raise ValueError(f"--out={out} has a run: --resume goes on with it")
  runtime.configure()
  run = Run(config, out, load_model(_START.value) if _START.value else None)
  run.train(_SECONDS.value, _WORKERS.value, _LOG_EVERY.value)
  run.export()
  print(json.dumps({"steps": run.step, "of": config.steps}), flush=True)


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, interrupted="--resume goes on from the last checkpoint in {out}", argv=argv)
