"""Rungs of the ladder side by side: the same requests, at several rates of arrival, within the same memory.

  sparse-serve ladder --rungs=dense,sparse_serve,psa --rates=0.5,1,2 --model=models/reference --out=/tmp/ladder

A rung is a configuration; --set changes all of them, so that they obey one cache.hbm_bytes, and --vary makes a rung of
each value: --vary=scheduler.max_batch=2,4,8. Each is compiled before it is timed. Goodput is the highest rate at which
99 % of the times between tokens are at most 25 decode iterations (those that the first rung takes for one request
alone), and requests wait at most 2 s on average before they are worked on: --goodput runs each rung at the rates up to
the first that it does not serve well, and searches between these two.
--overload runs all rungs also a tenth above the rate at which the first one's requests begin to wait longer than that.

The folder of --out gets cells.jsonl, a row for each rung and rate; iterations.jsonl, what each iteration did and took,
which `sparse-serve calibrate --ladder` fits costs to; answers.jsonl, the tokens of each rung; and made of these
results.md, results.csv and ladder.png. What is there is not run again. With --ray each rung is one process's. The last
line of stdout is a JSON object.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from absl import flags, logging

from sparse_serve_jax import cluster, results, runtime, workloads
from sparse_serve_jax.commands import cli
from sparse_serve_jax.commands.workload import WorkloadFlags, at_rate, digest, tell_refused
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.ladder import report, rungs
from sparse_serve_jax.ladder.cells import Engines, Ladder
from sparse_serve_jax.ladder.folder import claim
from sparse_serve_jax.ladder.goodput import Goodput
from sparse_serve_jax.models.here import load_model_for_others, load_model_here
from sparse_serve_jax.workloads import Item, Refused

_MODEL, _DTYPE = cli.define_model(default="models/reference")
with cli.group("What is compared"):
  _RUNGS = flags.DEFINE_list(
    "rungs",
    ["dense", "sparse", "sparse_offload", "sparse_serve", "psa"],
    "Names in configs/serving, or JSON files. The others are compared with the first.",
  )
  _RATES = flags.DEFINE_list("rates", ["0.5", "1", "2"], "Mean rates of arrival, in requests a second; 0: all at once.")
  _SET = flags.DEFINE_multi_string("set", [], "Overrides of every rung, such as cache.hbm_bytes=8GiB.")
  _VARY = flags.DEFINE_multi_string("vary", [], "KEY=VALUE,VALUE,...: a rung for each value, and for each of another.")
  _GOODPUT = flags.DEFINE_bool("goodput", False, "Search the highest rate that each rung serves well.")
  _OVERLOAD = flags.DEFINE_bool(
    "overload", False, "Also 1.1 times the rate at which the first rung's mean delay passes 2 s."
  )
  _RUNS = flags.DEFINE_integer(
    "most_runs", 8, "Rates to try between those given, for --goodput and --overload.", lower_bound=0
  )
_ASKED = WorkloadFlags(rate=False)
_RAY = cli.define_ray()
_OUT = cli.define_out("Folder of results.")
_VERBOSE = cli.define_verbose()


def main() -> int:
  """Returns 1 if a request of the workload was refused."""
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  configs, workload = rungs.read_rungs(_RUNGS.value, _SET.value, _varied()), _ASKED.read()
  rates = [workloads.checked_rate(rate) if rate else 0.0 for rate in cli.numbers(_RATES, float)]
  if not rates:
    raise ValueError("--rates has no rate, a ladder has one or more; 0 is all at once")
  if (_GOODPUT.value or _OVERLOAD.value) and not any(rates):
    raise ValueError(f"--goodput and --overload search between rates above 0, --rates has {_RATES.value}")
  source = workloads.read(workload)
  tell_refused(known := workloads.refused_by(source))
  out = results.take_folder(_OUT.value)
  of_model = _MODEL.value, _DTYPE.value, _ASKED.seed
  model = (load_model_for_others if _RAY.value else load_model_here)(*of_model)
  shapes = rungs.shapes(configs, model.config)
  items = source(model.tokenizer, min(shape.max_context for shape in shapes.values()))
  asked = [item for item in items if isinstance(item, Item)]
  tell_refused(item for item in items if isinstance(item, Refused) and item not in known)
  if not asked:
    raise ValueError(f"the workload has no request that can be served, of {len(items)}")
  rungs.check(configs, model.config, asked)
  tp = max(config.tp for config in configs.values())
  device = cluster.once(results.provenance, tp)["device"] if _RAY.value else None
  folder = claim(out, configs, model, workload, digest(workload), _ASKED.seed, device)

  def arrivals(rate: float) -> np.ndarray:
    return workloads.times_of(at_rate(workload, rate), len(asked))

  make = functools.partial(_engines, of_model, configs, asked) if _RAY.value else None
  run = Ladder(model, configs, asked, arrivals, folder)
  found = _measured(run, rates, make, tp)
  report.write(folder, run.cells, found)
  try:
    from sparse_serve_jax.plots import ladder as plots  # slow to import
    from sparse_serve_jax.plots.folder import made_by
  except ImportError as error:
    print(f"no plots, they need the packages of '.[eval]': {error}", file=sys.stderr)
  else:
    plots.write(folder, run.cells, found, made_by(folder))
  cli.end_with(report.text(run.cells, found), report.in_short(run.cells, found))
  return int(len(asked) < len(items))


def _measured(run: Ladder, rates: list[float], make: Callable[[], Engines] | None, tp: int) -> dict[str, Goodput]:
  """Runs all cells; with `make`, rungs beside each other. Returns what --goodput finds, by rung."""
  found: dict[str, Goodput] = {}

  def measure(run: Ladder, rung: str) -> None:
    searched = [rate for rate in rates if rate and _GOODPUT.value]  # as far as they are served well
    overload = [run.overload(rates, _RUNS.value)] if _OVERLOAD.value else []
    for rate in [rate for rate in rates if rate not in searched] + overload:
      run.cell(rung, rate)
    if _GOODPUT.value:
      found[rung] = run.goodput(rung, rates, _RUNS.value)

  def elsewhere(call: cluster.Call) -> Ladder:
    return run.served_by(functools.partial(call, "serve"))

  if make is None:
    for rung in run.rungs:
      measure(run, rung)
  else:
    first = measure if _OVERLOAD.value else lambda run, _: run.begin(rates)
    cluster.spread(make, run.rungs[:1], lambda call, rung: first(elsewhere(call), rung), tp)
    cluster.spread(make, run.rungs, lambda call, rung: measure(elsewhere(call), rung), tp)
  return {rung: found[rung] for rung in run.rungs if rung in found}


def _varied() -> dict[str, list[str]]:
  """Values by key, of --vary."""
  varied: dict[str, list[str]] = {}
  for given in _VARY.value:
    key, _, values = given.partition("=")
    if key in varied or not all(values.split(",")):
      raise ValueError(f"--vary: {given!r} is not KEY=VALUE,VALUE,... of a key that is given once")
    varied[key] = values.split(",")
  return varied


def _engines(of_model: tuple[str, str | None, int], configs: dict[str, EngineConfig], items: list[Item]) -> Engines:
  return Engines(load_model_here(*of_model), configs, items)


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, interrupted="the same command goes on from {out}", argv=argv)
