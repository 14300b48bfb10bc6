"""Serves a workload in virtual time: the engine and its scheduler, over a device that is only a cost.

  sparse-serve simulate --cost=cost.json --model=random:tiny --config=sparse_serve --limit=500 --rate=4

serves it by the costs that `sparse-serve calibrate` has fitted, without the model and as fast as Python plans it. The
costs hold for that model, device and kernels; memory, batches and rates may be others. --compare serves the workload
on this machine too. With --ladder the cells of ladders' folders are predicted, of the rung --config, and compared with
what was measured there:

  sparse-serve simulate --cost=cost.json --ladder=W2 --config=sparse_serve

In virtual time only lengths matter, and which prompts begin alike, where a trace says so: cached_share is what
the prefix cache held. Every output has all its tokens.

The table goes to stdout, and as its last line one JSON object with the same numbers. The folder of --out gets
requests.jsonl, a row for each request, and run.json, what the run was made by.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags, logging

from sparse_serve_jax import results, runtime
from sparse_serve_jax.commands import cli
from sparse_serve_jax.commands.workload import LadderFlag, WorkloadFlags, at_rate, digest
from sparse_serve_jax.config import load_config, override, with_fixed_sizes
from sparse_serve_jax.files import write_text
from sparse_serve_jax.ladder.folder import read_rung
from sparse_serve_jax.models import Model, load_model
from sparse_serve_jax.models.here import load_model_here
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.simulation.cost import Cost, read_cost
from sparse_serve_jax.simulation.served import Asked, serve_here, simulate

_CONFIG, _SET = cli.define_serving()
_MODEL, _DTYPE = cli.define_model(default="random:tiny")
with cli.group("The device"):
  _COST = flags.DEFINE_string("cost", None, "JSON file that `sparse-serve calibrate` wrote.", required=True)
with cli.group("What is compared"):
  _COMPARE = flags.DEFINE_bool("compare", False, "Serve the workload on this machine too.")
  _REPEATS = flags.DEFINE_integer("repeats", 3, "--compare: times to serve it, after once to compile.", lower_bound=1)
  _LADDER = LadderFlag("Folders of ladders, whose cells are predicted.", reads=("cost",))
_ASKED = WorkloadFlags(default="mixed")
_OUT = cli.define_out("Folder for requests.jsonl and run.json.", required=False)
_VERBOSE = cli.define_verbose()


def main() -> int:
  """Returns 1 if a request was refused, or none has finished."""
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  if folders := _LADDER.read():
    columns = _cells(read_cost(_COST.value), folders)
    cli.end_with(metrics.table(columns), columns)
    return 0
  config = with_fixed_sizes(override(load_config(_CONFIG.value), _SET.value))
  asked, cost = Asked(_ASKED.read()), read_cost(_COST.value)
  model = load_model_here(_MODEL.value, dtype=_DTYPE.value, seed=_ASKED.seed)
  _check_cost(cost, model)
  setting = {"config": config, "model": model.config, "cost": cost, "seed": _ASKED.seed}
  about = {"workload": asked.config, "prompts": digest(asked.config)}
  out = _OUT.value and results.claim(_OUT.value, setting | about)
  served, rows = simulate(config, model, cost, asked)
  if out:
    write_text(out / "requests.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
  told = served.to_dict()
  if _COMPARE.value:
    passes = serve_here(config, model, asked, _REPEATS.value)
    columns = {"simulated": told} | {f"measured {i + 1}": one.served.to_dict() for i, one in enumerate(passes)}
    cli.end_with(metrics.table(columns), columns)
  else:
    cli.end_with(metrics.table({pathlib.Path(_CONFIG.value).stem: told}), told)
  return 1 if told["refused"] or not told["requests"] else 0


def _check_cost(cost: Cost, model: Model) -> None:
  if (of := (cost.about.model, cost.about.dtype)) != (model.name, model.config.dtype):
    raise ValueError(f"{_COST.value} is of {' in '.join(of)}, and this is {model.name} in {model.config.dtype}")


def _cells(cost: Cost, folders: Sequence[pathlib.Path]) -> dict[str, dict[str, Any]]:
  """Of each cell what is simulated, with how far that is off, and what was measured."""
  columns = {}
  for folder, of in [(folder, read_rung(folder, _CONFIG.value)) for folder in folders]:
    model = load_model(of.ran.model_name, of.ran.model.dtype, of.seed)
    _check_cost(cost, model)
    for rate, cell in of.cells.items():
      asked = Asked(at_rate(of.ran.workload, rate))
      told = simulate(of.ran.config, model, cost, asked, of.max_request_tokens)[0].to_dict()
      name, measured = f"{folder.name} {rate:g}", {key: cell.get(key) for key in told}
      for key in ("throughput_tok_s", "ttft_mean_s"):
        there = told[key] is not None and cell[key]
        told[f"{key} off by"] = told[key] / cell[key] - 1 if there else None
      columns |= {f"{name} simulated": told, f"{name} measured": measured}
  return columns


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, argv=argv)
