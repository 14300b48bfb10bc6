"""Times the ops at the 8B shape, beside what would be used instead, on one NVIDIA GPU.

  sparse-serve bench-kernels --out=/tmp/bench --ops=score,attend

Prints a table for each op: time (median over calls; ±: their spread), bytes that must move, their floor at rates
measured in the same run, its share of the time, the same work by other means. The last line of stdout is one JSON
object, {"op-case": {"us", "floor_us", "fraction", ...}}; the folder of --out gets kernels.jsonl. --smoke tries it on
any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from sparse_serve_jax.benchmarks import kernels, timing
from sparse_serve_jax.benchmarks.timing import SMOKE, Effort
from sparse_serve_jax.commands import cli

with cli.group("What is timed"):
  _OPS = flags.DEFINE_list("ops", None, f"Some of {', '.join(kernels.OPS)}; by default all.")
  _IMPLEMENTATION = flags.DEFINE_enum(
    "implementation",
    None,
    ["xla", "triton", "interpret"],
    "Implementation of the ops; by default triton on a GPU, else xla.",
  )
  _CALLS = flags.DEFINE_integer("calls", 5, "Timed calls of a case.", lower_bound=1)
  _SECONDS = flags.DEFINE_float("seconds", 0.05, "Seconds of a call, in which an op is repeated.", lower_bound=0)
_OUT, _COMMIT, _SMOKE = cli.define_benchmark()
_VERBOSE = cli.define_verbose()


def main() -> int:
  ops = cli.chosen("ops", _OPS.value or ["all"], list(kernels.OPS))
  effort = SMOKE if _SMOKE.value else Effort(_CALLS.value, _SECONDS.value)
  report = timing.start(effort, cli.file_in(_OUT, "kernels.jsonl"), _IMPLEMENTATION.value, _COMMIT.value)
  kernels.measure(report, ops)
  return report.close()


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, interrupted="rows so far are in {out}", argv=argv)
