"""Serves a workload in virtual time: the engine and its scheduler, over a device that is only a cost.

  python -m experiments.simulate --cost=cost.json --calibrate --model=random:tiny --config=sparse_serve --requests=24
  python -m experiments.simulate --cost=cost.json --model=random:tiny --config=sparse_serve --requests=500 --rate=4

The first serves the workload on this machine, all requests at once, and fits the cost of an iteration to what it
measured. The second serves another workload with that cost, without the model and as fast as Python plans it; the costs
hold for that model, device and kernels, while memory, batches and rates may be others. --compare serves a workload both
ways. Only lengths matter, of the requests of a trace or drawn evenly from ranges; and which prompts begin alike, where
a trace says so: cached_share is what the prefix cache held.

The table goes to stdout, and as its last line one JSON object with the same numbers. The folder of --out gets
requests.jsonl, a row for each request, and run.json, what the run was made by.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from experiments import cli
from sparse_serve_jax import results, runtime
from sparse_serve_jax.attention.methods import get_method
from sparse_serve_jax.config import EngineConfig, load_config, override
from sparse_serve_jax.evaluation import selections
from sparse_serve_jax.models import Model
from sparse_serve_jax.models.here import load_model_here
from sparse_serve_jax.serving import metrics, run
from sparse_serve_jax.serving.clock import Clock, Virtual, Wall
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Executor
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.simulation.cost import About, Cost, fit, read_cost
from sparse_serve_jax.simulation.executor import SimulatedExecutor
from sparse_serve_jax.simulation.measure import Iteration, Stopwatch
from sparse_serve_jax.simulation.prefix import prompt_of
from sparse_serve_jax.simulation.reuse import Reuse, fit_reuse
from sparse_serve_jax.workloads import ArrivalConfig, Item, Trace, arrival_times, read_trace
from sparse_serve_jax.workloads.arrivals import checked_rate
from sparse_serve_jax.workloads.traces import rescaled

_TRACES = "models/reference/traces"
_CONFIG, _SET = cli.define_serving()
_MODEL, _DTYPE = cli.define_model(default="random:tiny")
with cli.group("The device"):
  _COST = flags.DEFINE_string(
    "cost", None, "JSON file, which --calibrate writes: costs of an iteration.", required=True
  )
  _CALIBRATE = flags.DEFINE_bool("calibrate", False, "Serve for real on this machine, and fit the costs.")
  _COMPARE = flags.DEFINE_bool("compare", False, "Simulate, and serve the same for real on this machine.")
  _REPEATS = flags.DEFINE_integer("repeats", 3, "Times to serve for real, after once to compile.", lower_bound=1)
  _SELECTIONS = flags.DEFINE_list(
    "selections",
    [f"{_TRACES}/recite_16384_2048.npz", f"{_TRACES}/renumber_16384_2048.npz"],
    "--calibrate: traces of selections, as experiments.accuracy writes them, which say how blocks come back.",
  )
with cli.group("What is asked"):
  _TRACE = flags.DEFINE_string("trace", None, "File of times and lengths (workloads/traces.py), instead of drawn ones.")
  _REQUESTS = flags.DEFINE_integer("requests", None, "Their number: 32, or all of a trace.", lower_bound=1)
  _PROMPT = flags.DEFINE_list("prompt_tokens", ["256", "1024"], "The least and the most.")
  _OUTPUT = flags.DEFINE_list("output_tokens", ["16", "64"], "The least and the most.")
  _RATE = flags.DEFINE_float("rate", None, "Arrivals a second: Poisson, by default all at once; a trace's rescaled.")
  _SEED = flags.DEFINE_integer("seed", 0, "Seed of lengths, arrivals and random weights.", lower_bound=0)
_OUT = cli.define_out("Folder for requests.jsonl and run.json.", required=False)
_VERBOSE = cli.define_verbose()


def main() -> int:
  """Returns 1 if no request has finished."""
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  if _CALIBRATE.value and _COMPARE.value:
    raise ValueError("--calibrate makes the costs that --compare tests: give one of them")
  config, lengths = override(load_config(_CONFIG.value), _SET.value), _lengths()
  cost = None if _CALIBRATE.value else read_cost(_COST.value)
  model = load_model_here(_MODEL.value, dtype=_DTYPE.value, seed=_SEED.value)
  if cost is None:
    return _calibrate(config, model, lengths)
  if (of := (cost.about.model, cost.about.dtype)) != (model.name, model.config.dtype):
    raise ValueError(f"{_COST.value} is of {' in '.join(of)}, and this is {model.name} in {model.config.dtype}")
  out = _OUT.value and results.claim(_OUT.value, {"config": config, "model": model.config, "cost": cost, **_workload()})
  rows: list[dict[str, Any]] = []
  clock = Virtual()
  vectors = get_method(config.sparse.method).vectors
  executor = SimulatedExecutor(config, model.config, cost, clock, vectors)
  simulated = _serve(executor, clock, lengths, rows).to_dict()
  if out:
    pathlib.Path(out, "requests.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
  name = pathlib.Path(_CONFIG.value).stem
  if _COMPARE.value:
    columns = {"simulated": simulated} | _measured(config, model, lengths)
    cli.end_with(metrics.table(columns), columns)
  else:
    cli.end_with(metrics.table({name: simulated}), simulated)
  return 0 if simulated["requests"] else 1


def _workload() -> dict[str, Any]:
  """What decides which requests there are."""
  return {flag.name: flag.value for flag in (_TRACE, _REQUESTS, _PROMPT, _OUTPUT, _RATE, _SEED)}


def _lengths() -> Trace:
  """The workload without its text."""
  rate, n = _RATE.value, _REQUESTS.value
  if _TRACE.value:
    whole = read_trace(_TRACE.value)
    times = whole.times if rate is None else rescaled(whole, checked_rate(rate))
    return Trace(times[:n], whole.prompt_tokens[:n], whole.output_tokens[:n], whole.hash_ids and whole.hash_ids[:n])
  n, rng = n or 32, np.random.default_rng(_SEED.value)
  drawn = []
  for flag in (_PROMPT, _OUTPUT):
    ends = cli.numbers(flag, int)
    if len(ends) > 2 or ends[0] < 1:
      raise ValueError(f"--{flag.name}: {','.join(flag.value)} is not the least and the most, from 1 on")
    drawn.append(rng.integers(ends[0], ends[-1], n, endpoint=True))
  arrivals = ArrivalConfig() if rate is None else ArrivalConfig("poisson", rate, _SEED.value)
  return Trace(arrival_times(arrivals, n), *drawn)


def _serve(executor: Executor, clock: Clock, lengths: Trace, rows: list[dict[str, Any]]) -> run.Served:
  """Serves requests of these lengths; each adds a row as it ends. Prompts begin alike where the trace says so; if it
  does not, on a clock that is `Virtual` all are zeros, which are not there in memory, and share nothing."""
  rng, vocab = np.random.default_rng(_SEED.value), executor.model.config.vocab_size

  def item(i: int, n: int, output: int) -> Item:
    if lengths.hash_ids is not None:
      return Item(str(i), prompt_of(lengths.hash_ids[i], n, vocab), output)
    if isinstance(clock, Virtual):
      return Item(str(i), np.broadcast_to(np.int32(0), (n,)), output, {"cache_salt": str(i)})
    return Item(str(i), rng.integers(0, vocab, n, dtype=np.int32), output)

  asked = zip(lengths.prompt_tokens.tolist(), lengths.output_tokens.tolist(), strict=True)
  items = [item(i, n, output) for i, (n, output) in enumerate(asked)]
  start = clock.now()

  def ended(end: Request | run.Refusal) -> None:
    row = run.row(end, start)
    row["output_tokens"] = len(row.pop("output_token_ids"))
    row.pop("token_s", None)
    rows.append(row)

  return run.serve(Engine(executor, clock=clock), items, lengths.times, ended, ignore_eos=True)


def _measured(config: EngineConfig, model: Model, lengths: Trace) -> dict[str, dict[str, Any]]:
  """The workload served here, --repeats times; names and results."""
  executor = JaxExecutor(config, model)
  served = [_serve(executor, Wall(), lengths, []) for _ in range(_REPEATS.value + 1)]
  return {f"measured {i}": one.to_dict() for i, one in enumerate(served) if i}


def _calibrate(config: EngineConfig, model: Model, lengths: Trace) -> int:
  """Fits a cost and writes it."""
  if lengths.times.any():
    raise ValueError("--calibrate has all requests arrive at once, so that each pass plans the same: leave out --rate")
  _writable(pathlib.Path(_COST.value))
  reuse = _reuse()
  executor, clock = JaxExecutor(config, model), Wall()
  _serve(executor, clock, lengths, [])  # compiles
  passes: list[list[Iteration]] = []
  for _ in range(_REPEATS.value):
    stopwatch = Stopwatch(executor, clock)
    _serve(stopwatch.executor, clock, lengths, [])
    passes.append(stopwatch.iterations)
  if len({len(one) for one in passes}) > 1:
    raise ValueError(f"the passes have different iterations, {[len(one) for one in passes]}: a request has failed")
  if config.sparse.policy == "psa":
    reuse = dataclasses.replace(reuse, psa_blocks=_blocks_read(passes[0], executor, config))
  works = [iteration.work for iteration in passes[0]]
  found = fit(works, np.median([[iteration.seconds for iteration in one] for one in passes], 0).tolist())
  device = jax.devices()[0]
  about = About(
    model=model.name,
    dtype=model.config.dtype,
    device=device.device_kind,
    config=json.dumps(dataclasses.asdict(config)),
    workload=json.dumps(_workload()),
    selections=",".join(pathlib.Path(file).name for file in _SELECTIONS.value),
    iterations=len(works),
    mean_error=found.mean_error,
    total_error=found.total_error,
  )
  results.replace_json(pathlib.Path(_COST.value), dataclasses.asdict(Cost(about, found.seconds, reuse)))
  told = {"iterations": len(works), "mean_error": found.mean_error, "total_error": found.total_error}
  told |= {f"{name} (s)": price for name, price in dataclasses.asdict(found.seconds).items()}
  cli.end_with(metrics.table({pathlib.Path(_CONFIG.value).stem: told}), told)
  return 0


def _writable(file: pathlib.Path) -> None:
  """Raises ValueError for a file that cannot be written."""
  if file.suffix != ".json":
    raise ValueError(f"--cost: {file} is to be a JSON file, its name ends in .json")
  if file.is_dir():
    raise ValueError(f"--cost: {file} is a directory, a file is wanted")
  results.make_folder(file.parent)


def _reuse() -> Reuse:
  """From traces of selections, all of one weight."""
  curves, densities = [], []
  for file in _SELECTIONS.value:
    trace = selections.Trace.load(file)
    told = selections.reuse(trace)
    blocks = np.array(told["blocks"])  # [L, K]
    curves.append((np.array(told["overlap"]) * blocks[..., None]).sum((0, 1)) / blocks.sum())
    densities.append(blocks.mean() / (trace.lengths + trace.selected.shape[1] / 2).mean() * trace.block_tokens)
  if not curves:
    raise ValueError("--selections: a trace or more is needed")
  return fit_reuse(np.mean(curves, 0).tolist(), float(np.mean(densities)))


def _blocks_read(iterations: list[Iteration], executor: JaxExecutor, config: EngineConfig) -> float:
  """Mean blocks that a step of PSA reads of a KV head, in the layers where it may stop."""
  dense_layers, shape = config.sparse.dense_layers, executor.shape
  rows = sum(iteration.rows for iteration in iterations)
  attended = sum(iteration.work.attended_blocks for iteration in iterations) / shape.K
  attended -= dense_layers * sum(iteration.full_blocks for iteration in iterations)
  return attended / (rows * (shape.L - dense_layers))


if __name__ == "__main__":
  cli.run(main)
