"""Times whole decode steps of a model with random weights, against what their bytes need, on one NVIDIA GPU.

  sparse-serve bench-step --out=/tmp/bench --cases=64x10240,20x32768

A case is <requests>x<tokens of each>. How steps are timed, and what their floor is: see
sparse_serve_jax/benchmarks/step.py. The last line of stdout is one JSON object; the folder of --out gets step.jsonl, a
row for each case. --smoke tries it on any machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from sparse_serve_jax.benchmarks import step, timing
from sparse_serve_jax.benchmarks.timing import SMOKE, Effort
from sparse_serve_jax.commands import cli
from sparse_serve_jax.config import ModelConfig, find_config, read_config
from sparse_serve_jax.memory.loads import LOADS

with cli.group("What is timed"):
  _MODEL = flags.DEFINE_string("model", "llama3-8b", "A name in configs/models, or a JSON file.")
  _CASES = flags.DEFINE_list("cases", ["64x10240", "20x32768"], "Requests x tokens of each.")
  _MISSES = flags.DEFINE_list("misses", ["0", "0.02", "0.1"], "Shares of the slots in use that are emptied, in [0, 1].")
  _DENSE = flags.DEFINE_list("dense_batches", ["1", "8", "32", "64"], "Rows of the layers without attention.")
  _SET = flags.DEFINE_multi_string(
    "set",
    [],
    "Overrides of what cases set themselves (step.Case.all_of), such as cache.hbm_bytes=8GiB; not of sparse.policy, "
    "sparse.dense_layers, implementation or tp.",
  )
  _LOADS = flags.DEFINE_list("loads", ["fused"], f"How what misses comes to the device: some of {', '.join(LOADS)}.")
  _BESIDE = flags.DEFINE_bool("beside_dense", False, "Also with dense attention, of cases whose KV fits HBM.")
  _STEPS = flags.DEFINE_integer("steps", 20, "Steps of a call.", lower_bound=1)
  _PROFILE = flags.DEFINE_bool("profile", False, "Also launches and time of every kernel, a layer.")
_OUT, _COMMIT, _SMOKE = cli.define_benchmark()
_VERBOSE = cli.define_verbose()


def main() -> int:
  sizes = cli.sizes(_CASES)
  batches = list(dict.fromkeys(map(_batch, _DENSE.value)))
  loads = cli.chosen("loads", _LOADS.value, list(LOADS))
  misses = {f"{100 * share:g}%": share for share in map(_share, _MISSES.value)}
  cfg, changes = read_config(ModelConfig, find_config("models", _MODEL.value)), _SET.value
  if _SMOKE.value:
    cfg, sizes, batches = read_config(ModelConfig, find_config("models", "tiny")), step.SMOKE_SIZES, [2]
    changes = [*step.SMOKE_CHANGES, *changes]
  cases = step.Case.all_of(cfg, sizes, changes)
  step.cache_shape(cfg, cases)  # so that what does not fit is told at once
  effort = SMOKE if _SMOKE.value else Effort()
  report = timing.start(effort, cli.file_in(_OUT, "step.jsonl"), commit=_COMMIT.value)
  runs = step.Runs(_STEPS.value, _PROFILE.value, loads, _BESIDE.value)
  step.measure(report, cfg, cases, misses, batches, runs)
  return report.close()


def _batch(text: str) -> int:
  """An entry of --dense_batches."""
  if not re.fullmatch(r"[1-9]\d*", text):
    raise ValueError(f"--dense_batches: {text!r} is no number of rows")
  return int(text)


def _share(text: str) -> float:
  """An entry of --misses."""
  try:
    share = float(text)
  except ValueError:
    share = math.nan
  if not 0 <= share <= 1:
    raise ValueError(f"--misses: {text!r} is no share in [0, 1]")
  return share


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, interrupted="rows so far are in {out}", argv=argv)
