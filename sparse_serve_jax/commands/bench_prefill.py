"""Times prefill of a model with random weights, from arrival to first token, on one NVIDIA GPU.

  sparse-serve bench-prefill --out=/tmp/bench --cases=1x2048,1x32000,64x2048 --ways=layer_segmented,quarter

A case is <requests>x<tokens of each>; all arrive at once and want one token. How they are timed, and what the floor is:
see sparse_serve_jax/benchmarks/prefill.py. The last line of stdout is one JSON object; the folder of --out gets
prefill.jsonl, a row for each case and way. --smoke tries it on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from sparse_serve_jax.benchmarks import prefill, timing
from sparse_serve_jax.benchmarks.timing import SMOKE, Effort
from sparse_serve_jax.commands import cli
from sparse_serve_jax.config import ModelConfig, find_config, read_config

with cli.group("What is timed"):
  _MODEL = flags.DEFINE_string("model", "llama3-8b", "A name in configs/models, or a JSON file.")
  _CASES = flags.DEFINE_list("cases", ["1x2048", "1x8192", "1x32000", "64x2048"], "Requests x tokens of each.")
  _WAYS = flags.DEFINE_list("ways", list(prefill.WAYS), f"Some of {', '.join(prefill.WAYS)}; cached: all but 1/16 is.")
  _SET = flags.DEFINE_multi_string("set", [], "Overrides of what ways set, such as cache.hbm_bytes=4GiB.")
_OUT, _COMMIT, _SMOKE = cli.define_benchmark()
_VERBOSE = cli.define_verbose()


def main() -> int:
  sizes = cli.sizes(_CASES)
  ways = cli.chosen("ways", _WAYS.value, list(prefill.WAYS))
  if not sizes or not ways:
    raise ValueError(f"--cases={','.join(sizes)} --ways={','.join(ways)}: there is nothing to time")
  cfg, changes = read_config(ModelConfig, find_config("models", _MODEL.value)), _SET.value
  if _SMOKE.value:
    cfg, sizes = read_config(ModelConfig, find_config("models", "tiny")), prefill.SMOKE_SIZES
    changes = [*prefill.SMOKE_CHANGES, *changes]
  for case in (prefill.Case(*size, way) for size in sizes.values() for way in ways):
    case.config(cfg, changes)  # so that what is wrong is told at once
  effort = SMOKE if _SMOKE.value else Effort()
  report = timing.start(effort, cli.file_in(_OUT, "prefill.jsonl"), commit=_COMMIT.value)
  prefill.measure(report, cfg, sizes, ways, changes)
  return report.close()


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, interrupted="rows so far are in {out}", argv=argv)
