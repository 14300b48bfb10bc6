"""Serves a workload in virtual time: the engine and its scheduler, over a device that is only a cost.

  sparse-serve simulate --cost=cost.json --calibrate --model=random:tiny --config=sparse_serve --limit=24
  sparse-serve simulate --cost=cost.json --model=random:tiny --config=sparse_serve --limit=500 --rate=4

The first serves the workload on this machine, all requests at once, and fits the cost of an iteration to what it
measured. The second serves another workload with that cost, without the model and as fast as Python plans it; the costs
hold for that model, device and kernels, while memory, batches and rates may be others. --compare serves a workload both
ways. With --ladder folders of `sparse-serve ladder` take this machine's place: --calibrate fits to what they hold of
the rung --config, and --compare predicts their cells:

  sparse-serve simulate --cost=cost.json --calibrate --ladder=W1,W3 --config=sparse_serve
  sparse-serve simulate --cost=cost.json --compare --ladder=W2 --config=sparse_serve

In virtual time only lengths matter, and which prompts begin alike, where a trace says so: cached_share is what
the prefix cache held. Every output has all its tokens.

The table goes to stdout, and as its last line one JSON object with the same numbers. The folder of --out gets
requests.jsonl, a row for each request, and run.json, what the run was made by.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags, logging

from sparse_serve_jax import results, runtime, workloads
from sparse_serve_jax.attention.decode import Selector
from sparse_serve_jax.commands import cli
from sparse_serve_jax.commands.workload import WorkloadFlags, at_rate, digest
from sparse_serve_jax.config import EngineConfig, load_config, override, with_fixed_sizes
from sparse_serve_jax.evaluation import kept, selections
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.models import Model, load_model, reference
from sparse_serve_jax.models.here import load_model_here
from sparse_serve_jax.serving import metrics, run
from sparse_serve_jax.serving.clock import Clock, Virtual, Wall
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Executor, Observed
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.simulation.cost import About, Cost, fit, read_cost
from sparse_serve_jax.simulation.executor import SimulatedExecutor
from sparse_serve_jax.simulation.measure import Iteration, Stopwatch, typical
from sparse_serve_jax.simulation.prefix import prompt_of
from sparse_serve_jax.simulation.reuse import Reuse, fit_reuse
from sparse_serve_jax.workloads import Item, Refused, generated

_TRACES = "models/reference/traces"
_CONFIG, _SET = cli.define_serving()
_MODEL, _DTYPE = cli.define_model(default="random:tiny")
with cli.group("The device"):
  _COST = flags.DEFINE_string(
    "cost", None, "JSON file, which --calibrate writes: costs of an iteration.", required=True
  )
  _CALIBRATE = flags.DEFINE_bool("calibrate", False, "Serve for real on this machine, and fit the costs.")
  _COMPARE = flags.DEFINE_bool("compare", False, "Simulate, and serve the same for real on this machine.")
  _LADDER = flags.DEFINE_list("ladder", [], "Folders of ladders, for --calibrate and --compare.")
  _REPEATS = flags.DEFINE_integer("repeats", 3, "Times to serve for real, after once to compile.", lower_bound=1)
  _SELECTIONS = flags.DEFINE_list(
    "selections",
    [f"{_TRACES}/recite_16384_2048.npz", f"{_TRACES}/renumber_16384_2048.npz"],
    "--calibrate: traces of selections, as `sparse-serve accuracy` writes them, which say how blocks come back.",
  )
_WITH_LADDER = {"cost", "calibrate", "compare", "ladder", "selections", "config", "verbose"}  # flags that are read
_ASKED = WorkloadFlags(default="mixed")
_OUT = cli.define_out("Folder for requests.jsonl and run.json.", required=False)
_VERBOSE = cli.define_verbose()


def main() -> int:
  """Returns 1 if a request was refused, or none has finished."""
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  if _CALIBRATE.value and _COMPARE.value:
    raise ValueError("--calibrate makes the costs that --compare tests: give one of them")
  if _LADDER.value:
    if told := [name for name in flags.FLAGS if flags.FLAGS[name].present and name not in _WITH_LADDER]:
      raise ValueError(f"--ladder: its folders hold what was served and how, leave out --{', --'.join(told)}")
    return _from_ladders([kept.read(pathlib.Path(folder), _CONFIG.value) for folder in _LADDER.value])
  config = with_fixed_sizes(override(load_config(_CONFIG.value), _SET.value))
  asked = Asked(_ASKED.read())
  cost = None if _CALIBRATE.value else read_cost(_COST.value)
  model = load_model_here(_MODEL.value, dtype=_DTYPE.value, seed=_ASKED.seed)
  if cost is None:
    return _calibrate(config, model, asked)
  _check_cost(cost, model)
  setting = {"config": config, "model": model.config, "cost": cost, "seed": _ASKED.seed}
  about = {"workload": asked.config, "prompts": digest(asked.config)}
  out = _OUT.value and results.claim(_OUT.value, setting | about)
  rows: list[dict[str, Any]] = []
  clock, executor = _device(config, model, cost)
  items = asked.without_text(model, executor.shape.max_context)
  simulated = asked.serve(executor, clock, items, rows).to_dict()
  if out:
    pathlib.Path(out, "requests.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
  name = pathlib.Path(_CONFIG.value).stem
  if _COMPARE.value:
    columns = {"simulated": simulated} | _measured(config, model, asked)
    cli.end_with(metrics.table(columns), columns)
  else:
    cli.end_with(metrics.table({name: simulated}), simulated)
  return 1 if simulated["refused"] or not simulated["requests"] else 0


def _check_cost(cost: Cost, model: Model) -> None:
  if (of := (cost.about.model, cost.about.dtype)) != (model.name, model.config.dtype):
    raise ValueError(f"{_COST.value} is of {' in '.join(of)}, and this is {model.name} in {model.config.dtype}")


def _device(config: EngineConfig, model: Model, cost: Cost) -> tuple[Virtual, SimulatedExecutor]:
  """One in virtual time, and its clock."""
  clock = Virtual()
  return clock, SimulatedExecutor(config, model.config, cost, clock, Selector.of(config).method.vectors)


class Asked:
  """What is served, and when. Its text is made where it is needed."""

  def __init__(self, config: workloads.WorkloadConfig):
    self.config, self._source = config, workloads.read(config)

  def items(self, model: Model, max_request_tokens: int) -> list[Item | Refused]:
    return self._source(model.tokenizer, max_request_tokens)

  def without_text(self, model: Model, max_request_tokens: int) -> list[Item | Refused]:
    """The same requests with prompts of zeros, which take no memory and share nothing; or by the ids of a trace."""

    def bare(name: str, n_prompt: int, n_output: int) -> Item:
      return Item(name, np.broadcast_to(np.int32(0), (n_prompt,)), n_output, {"cache_salt": name})

    if self.config.source in ("text", "trace"):  # text as long as that of thousands of requests takes minutes
      source, asked = self.config.source, generated.lengths(self.config)
      each = enumerate(zip(asked.prompt_tokens.tolist(), asked.output_tokens.tolist(), strict=True))
      if asked.hash_ids is None:
        return [bare(f"{source}-{i}", *both) for i, both in each]
      vocab = model.config.vocab_size
      return [Item(f"{source}-{i}", prompt_of(asked.hash_ids[i], n, vocab), output) for i, (n, output) in each]
    return [
      bare(item.id, len(item.prompt), item.max_new_tokens) if isinstance(item, Item) else item
      for item in self.items(model, max_request_tokens)
    ]

  def serve(
    self,
    executor: Executor,
    clock: Clock,
    items: Sequence[Item | Refused],
    rows: list[dict[str, Any]],
    observer: Callable[[Observed], None] | None = None,
  ) -> run.Served:
    """Serves `items`; each adds a row as it ends."""
    start, arrivals = clock.now(), workloads.times_of(self.config, len(items))

    def ended(end: Request | run.Refusal) -> None:
      row = run.row(end, start)
      row["output_tokens"] = len(row.pop("output_token_ids"))
      row.pop("token_s", None)
      rows.append(row)

    return run.serve(Engine(executor, clock=clock, observer=observer), items, arrivals, ended, ignore_eos=True)


def _measured(config: EngineConfig, model: Model, asked: Asked) -> dict[str, dict[str, Any]]:
  """The workload served here, --repeats times; names and results."""
  executor = JaxExecutor(config, model)
  items = asked.items(model, executor.shape.max_context)
  served = [asked.serve(executor, Wall(), items, []) for _ in range(_REPEATS.value + 1)]
  return {f"measured {i}": one.to_dict() for i, one in enumerate(served) if i}


def _from_ladders(ladders: list[kept.Kept]) -> int:
  """Fits a cost to all cells of a rung, or predicts each of them."""
  if _CALIBRATE.value:
    _writable(pathlib.Path(_COST.value))
    first, cells = ladders[0], [cell for of in ladders for cell in of.iterations.values()]
    if len(of := {f"{of.model_name} in {of.model.dtype} on {of.device}" for of in ladders}) > 1:
      raise ValueError(f"--ladder: costs are of one model and device, these are of {', '.join(sorted(of))}")
    iterations = [one for cell in cells for one in cell]
    about = dict(model=first.model_name, dtype=first.model.dtype, device=first.device)
    about["workload"] = json.dumps([dataclasses.asdict(of.workload) for of in ladders])
    return _fit(first.config, first.shape, iterations, [one.seconds for one in iterations], about, _reuse())
  if not _COMPARE.value:
    raise ValueError("--ladder takes this machine's place in --calibrate or --compare: give one of them")
  cost, columns = read_cost(_COST.value), {}
  for of in ladders:
    model = load_model(of.model_name, of.model.dtype, of.seed)
    _check_cost(cost, model)
    for rate, cell in of.cells.items():
      asked, (clock, executor) = Asked(at_rate(of.workload, rate)), _device(of.config, model, cost)
      # What its source refuses a ladder leaves out before requests have times.
      items = [item for item in asked.without_text(model, of.max_request_tokens) if isinstance(item, Item)]
      simulated = asked.serve(executor, clock, items, []).to_dict()
      name, measured = f"{of.folder.name} {rate:g}", {key: cell.get(key) for key in simulated}
      for key in ("throughput_tok_s", "ttft_mean_s"):
        there = simulated[key] is not None and cell[key]
        simulated[f"{key} off by"] = simulated[key] / cell[key] - 1 if there else None
      columns |= {f"{name} simulated": simulated, f"{name} measured": measured}
  cli.end_with(metrics.table(columns), columns)
  return 0


def _calibrate(config: EngineConfig, model: Model, asked: Asked) -> int:
  """Fits a cost and writes it."""
  if asked.config.arrivals.process != "all_at_once":
    raise ValueError(
      "--calibrate has all requests arrive at once, so that each pass plans the same: leave out --rate; "
      f"arrivals.process is {asked.config.arrivals.process}"
    )
  _writable(pathlib.Path(_COST.value))
  reuse = _reuse()
  executor, clock = JaxExecutor(config, model), Wall()
  items = asked.items(model, executor.shape.max_context)
  asked.serve(executor, clock, items, [])  # compiles
  passes: list[list[Iteration]] = []
  for _ in range(_REPEATS.value):
    stopwatch = Stopwatch(executor)
    asked.serve(executor, clock, items, [], stopwatch.observe)
    passes.append(stopwatch.iterations)
  if len({len(one) for one in passes}) > 1:
    raise ValueError(f"the passes have different iterations, {[len(one) for one in passes]}: a request has failed")
  about = dict(model=model.name, dtype=model.config.dtype, device=jax.devices()[0].device_kind)
  about["workload"] = json.dumps(dataclasses.asdict(asked.config))
  return _fit(config, executor.shape, passes[0], typical(passes), about, reuse)


def _fit(
  config: EngineConfig,
  shape: CacheShape,
  iterations: list[Iteration],
  seconds: list[float],
  about: dict[str, str],
  reuse: Reuse,
) -> int:
  """Fits a cost to iterations and writes it; `about` is what they are of."""
  if config.sparse.policy == "psa":
    reuse = dataclasses.replace(reuse, psa_blocks=_blocks_read(iterations, shape, config))
  found = fit([iteration.work for iteration in iterations], seconds)
  made = About(
    **about,
    config=json.dumps(dataclasses.asdict(config)),
    selections=",".join(pathlib.Path(file).name for file in _SELECTIONS.value),
    iterations=len(iterations),
    mean_error=found.mean_error,
    total_error=found.total_error,
  )
  results.replace_json(pathlib.Path(_COST.value), dataclasses.asdict(Cost(made, found.seconds, reuse)))
  told = {"iterations": len(iterations), "mean_error": found.mean_error, "total_error": found.total_error}
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
    trace = selections.Trace.load(reference.file(file))
    told = selections.reuse(trace)
    blocks = np.array(told["blocks"])  # [L, K]
    curves.append((np.array(told["overlap"]) * blocks[..., None]).sum((0, 1)) / blocks.sum())
    densities.append(blocks.mean() / (trace.lengths + trace.selected.shape[1] / 2).mean() * trace.block_tokens)
  if not curves:
    raise ValueError("--selections: a trace or more is needed")
  return fit_reuse(np.mean(curves, 0).tolist(), float(np.mean(densities)))


def _blocks_read(iterations: list[Iteration], shape: CacheShape, config: EngineConfig) -> float:
  """Mean blocks that a step of PSA reads of a KV head, in the layers where it may stop."""
  dense_layers = config.sparse.dense_layers
  rows = sum(iteration.rows for iteration in iterations)
  attended = sum(iteration.work.attended_blocks for iteration in iterations) / shape.K
  attended -= dense_layers * sum(iteration.full_blocks for iteration in iterations)
  return attended / (rows * (shape.L - dense_layers))


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, argv=argv)
